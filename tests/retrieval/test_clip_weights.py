"""Weights of a CLIP in every form that they are found in, equal outputs after each; and that no file runs code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from small_clip import registered, small_clip
from torch import Tensor, nn

from retrieval.batch import Captions, collate_text
from retrieval.clip4clip.tokenizer import ClipTokenizer
from retrieval.clip4clip.torchscript_archive import read_torchscript
from retrieval.clip4clip.towers import open_clip_tower
from retrieval.clip4clip.weights import read_clip_weights
from retrieval.models import clip4clip

NUMBERS = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}


class Leaf(nn.Module):
    """A module with given tensors and given children: of it, a module of any state dict can be scripted."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in dict.fromkeys(name.partition(".")[0] for name in tensors):
            inside = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == name}
            if "" not in inside:
                self.add_module(name, Leaf(inside))
            elif inside[""].is_floating_point():
                self.register_parameter(name, nn.Parameter(inside[""]))
            else:
                self.register_buffer(name, inside[""])

    def forward(self, x: Tensor) -> Tensor:
        return x


def theirs() -> nn.Module:
    """A CLIP whose weights are whole numbers over 64, which float16 holds exactly."""
    torch.manual_seed(1)
    model = open_clip.create_model(registered()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return model


def openai(model: nn.Module) -> dict[str, Tensor]:
    """As OpenAI saved it: matrices in float16, the rest in float32, and three numbers."""
    state = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()}
    return state | {name: torch.tensor(number) for name, number in NUMBERS.items()}


def scripted(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(Leaf(openai(model))), path)


def traced(model: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.trace(Leaf(openai(model)), torch.ones(1)), path)


FORMS: dict[str, tuple[str, Callable[[nn.Module, Path], None]]] = {
    "open_clip's safetensors": ("x.safetensors", lambda model, path: save_file(model.state_dict(), path)),
    "open_clip's state dict": ("x.pt", lambda model, path: torch.save(model.state_dict(), path)),
    "open_clip's checkpoint": (
        "x.pt",
        lambda model, path: torch.save(
            {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, path
        ),
    ),
    "OpenAI's state dict": ("x.pt", lambda model, path: torch.save(openai(model), path)),
    "OpenAI's safetensors": ("x.safetensors", lambda model, path: save_file(openai(model), path)),
    "OpenAI's archive, scripted": ("x.pt", scripted),
    "OpenAI's archive, traced": ("x.pt", traced),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equal_outputs_from_every_form(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    expected = theirs()
    write(expected, tmp_path / name)
    model, tokenizer = open_clip_tower(registered(), tmp_path / name, context_length=77)
    assert not model.training and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    images, ids = torch.randn(2, 3, 32, 32), tokenizer(["an owl", "a dog spinning"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), expected.encode_image(images))
        torch.testing.assert_close(model.encode_text(ids), expected.encode_text(ids))
    assert torch.equal(model.logit_scale, expected.logit_scale)
    cut, tokenizer = open_clip_tower(registered(), tmp_path / name)
    assert torch.equal(cut.positional_embedding, expected.positional_embedding[:32])
    assert tokenizer(["an owl"]).shape == (1, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_archive_is_what_torch_reads(tmp_path: Path) -> None:
    scripted(theirs(), tmp_path / "x.pt")
    ours, torchs = read_torchscript(tmp_path / "x.pt"), torch.jit.load(tmp_path / "x.pt").state_dict()
    assert ours.keys() == torchs.keys()
    for name, tensor in torchs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
    view = torch.arange(12.0).view(3, 4)[:, 1:3]  # an offset and strides of its own
    torch.jit.save(torch.jit.script(Leaf({"a.view": view, "empty": torch.zeros(0, 3)})), tmp_path / "views.pt")
    read = read_torchscript(tmp_path / "views.pt")
    assert torch.equal(read["a.view"], view) and read["empty"].shape == (0, 3)


class WritesOnLoad(nn.Module):
    """What torch.jit.load would run: an archive may bring a `__setstate__` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.path = ""

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.ops.aten.save(self.weight, self.path)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_of_an_archive_is_run(tmp_path: Path) -> None:
    model = WritesOnLoad()
    model.path = str(tmp_path / "written")
    torch.jit.save(torch.jit.script(model), tmp_path / "x.pt")
    assert not (tmp_path / "written").exists()
    with pytest.raises(ValueError, match="does not hold the weights"):
        open_clip_tower(registered(), tmp_path / "x.pt")
    assert not (tmp_path / "written").exists()
    torch.jit.load(tmp_path / "x.pt")
    assert (tmp_path / "written").exists(), "if torch stops running it, torch.jit.load could be used"


class Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (__import__("os").mkdir, ("evil",))


@pytest.mark.parametrize("form", ["pickle", "checkpoint", "archive"])
def test_a_file_that_would_run_code_is_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif form == "checkpoint":
        torch.save({"logit_scale": torch.zeros(()), "more": Evil()}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(Evil(), protocol=2))
            archive.writestr("x/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"is not opened|holds no module"):
        open_clip_tower(registered(), path)
    assert not (tmp_path / "evil").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        open_clip_tower(registered(), tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("this is not it")
    with pytest.raises(ValueError, match="does not hold the weights"):
        open_clip_tower(registered(), tmp_path / "text.safetensors")
    (tmp_path / "x.npz").write_text("nor is this")
    with pytest.raises(ValueError, match=r"ends in \.safetensors, \.pt"):
        open_clip_tower(registered(), tmp_path / "x.npz")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds list; expected a state dict"):
        open_clip_tower(registered(), tmp_path / "list.pt")
    state = theirs().state_dict()
    state["visual.proj"] = torch.zeros(64, 3)
    state["more"] = state.pop("ln_final.bias")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"1 missing, ln_final\.bias; 1 unexpected, more; 1 misshaped, visual\.proj \(64"
    ):
        open_clip_tower(registered(), tmp_path / "other.safetensors")


def test_openais_weights_need_quick_gelu(tmp_path: Path) -> None:
    save_file(openai(theirs()), tmp_path / "x.safetensors")
    gelu = registered("small-clip-of-tests", quick_gelu=False)
    with pytest.raises(ValueError, match="use small-clip-of-tests-quickgelu"):
        open_clip_tower(gelu, tmp_path / "x.safetensors")


def test_captions_are_tokenized_as_open_clip_does() -> None:
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    sentences = ["An OWL, spinning!", "a dog &amp; a cat", "one two three four five six seven eight nine ten eleven"]
    captions = Captions(sentences, ClipTokenizer(theirs), max_length=32)
    batch = collate_text(captions.ids, length=12)
    assert torch.equal(batch["input_ids"], theirs(sentences))
    assert [len(ids) for ids in captions.ids][2] == 12
    assert torch.equal(
        batch["attention_mask"].bool(), torch.arange(12) < torch.tensor(list(map(len, captions.ids)))[:, None]
    )
    assert Captions(sentences, ClipTokenizer(theirs), max_length=8).ids[2][-1] == 49407
    with pytest.raises(ValueError, match="a caption has 12 tokens, but the text tower takes 10"):
        collate_text(captions.ids, length=10)


def test_the_model_by_settings(tmp_path: Path) -> None:
    save_file(theirs().state_dict(), tmp_path / "x.safetensors")
    weights = str(tmp_path / "x.safetensors")
    model, tokenizer = clip4clip(None, tmp_path, towers=registered(), weights=weights, head="seqLSTM")
    assert torch.equal(model.clip.visual.proj, theirs().visual.proj)
    assert model.text_length == 32 and isinstance(tokenizer, ClipTokenizer)
    assert clip4clip(None, tmp_path, towers=registered(), weights="random")[0].text_length == 32
    with pytest.raises(ValueError, match="needs weights: a local file, or 'random'"):
        clip4clip(None, tmp_path, towers=registered())
    with pytest.raises(ValueError, match="set both to null"):
        clip4clip(None, tmp_path, towers=registered(), weights=weights, image_size=56)
    with pytest.raises(ValueError, match="bring their weights"):
        clip4clip(None, tmp_path, weights=weights)


def test_padding_tokens_are_no_samples_of_a_regularizer() -> None:
    """CLIP's text tower always runs 16 tokens; of two sentences of 4 and 3, seven are real."""
    from adapters import LoRA, inject
    from regularizers import capture
    from retrieval.clip4clip import CLIP4Clip

    model = CLIP4Clip(small_clip())
    inject(model, LoRA(rank=2, targets=("q",)))
    frames, mask = torch.randn(2, 2, 3, 32, 32), torch.tensor([[True, True], [True, False]])
    batch = collate_text([[5, 6, 7, 49407], [5, 6, 49407]], model.text_length)
    with capture(model) as subspaces:
        model(frames, mask, **batch)
    rows = {name: len(pair.activations) for name, pair in subspaces.items()}
    assert {count for name, count in rows.items() if "visual" not in name} == {7}
    assert {count for name, count in rows.items() if "visual" in name} == {3 * 5}  # frames x (class and 4 patches)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_archive_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.script(Leaf({"a.weight": torch.arange(12.0).view(3, 4), "b": torch.zeros(2)})), path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        refused += is_refused(path)
    for _ in range(300):  # past the checksums of the zip file, as another writer's mistake is
        changed = {name: bytearray(content) for name, content in members.items()}
        (index,) = [name for name in members if name.endswith("data.pkl")]
        changed[index][random.integers(len(changed[index]))] = random.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in changed.items():
                archive.writestr(name, bytes(content))
        refused += is_refused(path)
    assert refused > 100, "the others were damaged where it does not matter"


def is_refused(path: Path) -> bool:
    """Whether a file is refused by a ValueError that names it; whatever else is raised ends the test."""
    try:
        read_clip_weights(path)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    return False
