"""Two processes with half the batch each have the gradients of one process with all of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import adapters  # noqa: F401  (a spawned process imports this file alone)

# isort: split
import torch
from torch import Tensor, nn

from adapters import LoRA, inject
from regularizers import ReSoRA
from retrieval.clip4clip import CLIP4Clip
from retrieval.gather import gather, processes, rank
from retrieval.losses import InfoNCE, TripletLoss

EPOCH = 2.0  # past the triplet loss's warm-up
CASES: dict[str, tuple[str, Any]] = {
    "meanP": ("meanP", InfoNCE()),
    "transformer": ("seqTransf", InfoNCE()),
    "triplet": ("seqLSTM", TripletLoss()),
    "tight": ("tightTransf", InfoNCE()),
}


class Towers(nn.Module):
    """Two small towers with the methods of open_clip's, which takes ten seconds to import."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential()
        self.visual.image_size = 2
        self.visual.mlp = nn.ModuleDict({"c_fc": nn.Linear(12, 20), "c_proj": nn.Linear(20, 16)})
        self.words = nn.Embedding(50, 20)
        self.text_projection = nn.Linear(20, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual.mlp["c_proj"](torch.tanh(self.visual.mlp["c_fc"](images.flatten(1))))

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text_projection(torch.tanh(self.words(ids).sum(dim=1)))


def model_of(head: str) -> nn.Module:
    torch.manual_seed(0)
    model = CLIP4Clip(Towers(), head=head, max_frames=3)
    if model.pair_scores is not None:
        model.pair_scores.dropout = 0.0
    inject(model, LoRA(rank=2, targets=("fc1", "fc2")), train=(*model.heads, "clip.words"))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.5)
    return model.double().train()


def batch() -> dict[str, Tensor]:
    """Four pairs, of which the third has no frames."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(4, 3, 3, 2, 2, generator=generator, dtype=torch.float64)
    mask = torch.arange(3) < torch.tensor([3, 1, 0, 2])[:, None]
    return {"frames": frames, "frame_mask": mask, "input_ids": torch.randint(1, 50, (4, 5), generator=generator)}


def gradients(model: nn.Module, inputs: dict[str, Tensor], loss: Any) -> dict[str, Tensor]:
    """Of the loss and a penalty on weights, which is the same whatever the batch."""
    resora = ReSoRA("overlap", weight=0.3, on="weights")
    with resora.capture(model) as subspaces:
        outputs = model(**inputs)
    torch.stack([*loss(outputs, EPOCH).values(), *resora(subspaces).values()]).sum().backward()
    plain = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}


def _process(number: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=number, world_size=2)
    assert (processes(), rank()) == (2, number)
    x = torch.full((2, 3), float(number), requires_grad=True)
    (gather(x) * torch.arange(4.0)[:, None] * (1 + number)).sum().backward()  # the losses of the two are summed
    assert torch.equal(x.grad, (torch.tensor([[0.0], [1.0]]) + 2 * number).expand(2, 3) * 3)
    half = {name: tensor[2 * number : 2 * number + 2] for name, tensor in batch().items()}
    for case, (head, loss) in CASES.items():
        wrapped = nn.parallel.DistributedDataParallel(model_of(head), find_unused_parameters=True)
        for _ in range(2):  # twice: DistributedDataParallel raises where the first pass left something unfinished
            wrapped.zero_grad()
            found = gradients(wrapped, half, loss)
        torch.save(found, f"{folder}/{case}{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    for case, (head, loss) in CASES.items():
        expected = gradients(model_of(head), batch(), loss)
        assert {"clip.visual.mlp.c_fc.branches.fc1.A", "clip.words.weight"} <= expected.keys()
        assert ("clip.logit_scale" in expected) == (case in ("meanP", "transformer")), "what the loss uses"
        for number in (0, 1):
            found = torch.load(tmp_path / f"{case}{number}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    found[name], gradient, atol=1e-6, rtol=1e-6, msg=lambda text, at=(case, name): f"{at}: {text}"
                )


def test_with_one_process_nothing_is_gathered() -> None:
    x = torch.ones(2, 3)
    assert gather(x) is x and (processes(), rank()) == (1, 0)
