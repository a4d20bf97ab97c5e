"""capture under what a training script wraps a model in: autocast, compilation, accumulation, several processes."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_berts import IDS, MASK, gradients, penalty, with_ours, with_peft
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from regularizers import ReSoRA, capture


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_autocast(build: Any) -> None:
    model = build()
    exact = penalty(model, input_ids=IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = penalty(model, input_ids=IDS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)
    rounded.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_compilation_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match="is compiled"), capture(torch.compile(build(), backend="eager")):
        pass
    in_place = build()
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"), capture(in_place):
        pass


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_accumulated_gradients_are_the_sum_of_those_of_each_batch(build: Any) -> None:
    separate: dict[str, Tensor] = {}
    for rows in (slice(0, 2), slice(2, 3)):
        model = build()
        penalty(model, input_ids=IDS[rows], attention_mask=MASK[rows]).backward()
        separate = {n: g + separate.get(n, 0.0) for n, g in gradients(model).items()}
    model = build()
    for rows in (slice(0, 2), slice(2, 3)):
        penalty(model, input_ids=IDS[rows], attention_mask=MASK[rows]).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, separate[name])


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_sharded_parameters_are_refused(build: Any, one_process: DeviceMesh) -> None:
    stand_in = type("FullyShardedDataParallel", (nn.Sequential,), {})  # that of torch wants an accelerator
    with pytest.raises(ValueError, match=r"by FullySharded.*: capture does not"), capture(stand_in(build())):
        pass
    with pytest.raises(ValueError, match="is wrapped by FSDPModule"), capture(fully_shard(build(), mesh=one_process)):
        pass
    tensor_parallel, zero = build(), build()
    layer = next(name for name, _ in zero.named_parameters() if name.endswith((".A", "lora_A.default.weight")))
    module, _, parameter = layer.rpartition(".")
    owner = tensor_parallel.get_submodule(module)
    setattr(owner, parameter, nn.Parameter(distribute_tensor(getattr(owner, parameter).detach(), one_process)))
    with pytest.raises(ValueError, match=f"{layer} is a DTensor"), capture(tensor_parallel):
        pass
    zero.get_parameter(layer).ds_id = 0
    with pytest.raises(ValueError, match=f"{layer} is partitioned by DeepSpeed's ZeRO-3"), capture(zero):
        pass


def _penalised(wrapped: nn.Module, row: int) -> list[str]:
    rows = slice(row, row + 1)
    resora = ReSoRA("overlap", weight=1.0)
    with resora.capture(wrapped) as subspaces:
        output = wrapped(input_ids=IDS[rows], attention_mask=MASK[rows], labels=torch.tensor([1]))
    (output.loss + sum(resora(subspaces).values())).backward()
    return list(subspaces)


def _process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for build in (with_ours, with_peft):
        model = build().train()
        names = _penalised(nn.parallel.DistributedDataParallel(model), rank)
        assert not any(name.startswith("module.") for name in names)
        torch.save(gradients(model), f"{folder}/{build.__name__}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ddp_averages_the_penalties_of_its_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    for build in (with_ours, with_peft):
        expected: dict[str, Tensor] = {}
        for row in (0, 1):
            model = build().train()
            _penalised(model, row)
            expected = {name: g / 2 + expected.get(name, 0.0) for name, g in gradients(model).items()}
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{build.__name__}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("build", [with_peft, with_ours])
def test_linear_costs_next_to_no_flops(build: Any) -> None:
    """At these tiny sizes the share is larger than in a real layer; the forward pass is not computed twice."""
    model = build().train()

    def flops(resora: ReSoRA | None) -> int:
        with FlopCounterMode(display=False) as counter:
            if resora is None:
                model(input_ids=IDS, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
            else:
                with resora.capture(model) as subspaces:
                    loss = model(input_ids=IDS, labels=torch.zeros(3, dtype=torch.long)).loss
                (loss + sum(resora(subspaces).values())).backward()
        return counter.get_total_flops()

    gram = 2 * 18 * 4 * 4  # (r, N) x (N, r)
    assert flops(ReSoRA("linear")) - flops(None) == 4 * (gram + 2 * gram)  # four layers; the product is derived twice


def test_a_copy_of_the_model_is_captured_on_its_own() -> None:
    model = with_ours()
    twin = copy.deepcopy(model)
    with capture(twin) as subspaces:
        model(input_ids=IDS)
    assert not subspaces
