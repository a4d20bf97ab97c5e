"""The tensors of a TorchScript archive (OpenAI's ViT-B-32.pt), read without running anything that it holds.

    state = read_torchscript("ViT-B-32.pt")        # what torch.jit.load("ViT-B-32.pt").state_dict() would give

`torch.jit.load` does not unpickle in Python, but it is no safe reader either: it compiles the archive's code and runs
the `__setstate__` of its classes, which may write files (since CVE-2025-32434, `torch.load(weights_only=True)` refuses
to call it). The archive is a zip file: `data.pkl` says which object has which attributes, `data/<key>` are the bytes of
one storage each. `data.pkl` is read here opcode by opcode, into names, tuples and dictionaries; nothing is imported,
called or compiled.
"""

from __future__ import annotations

import lzma
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor

REBUILD = "torch._utils _rebuild_tensor_v2"
STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ShortStorage": torch.int16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
}
DAMAGE = (  # what zipfile, pickletools and the code below raise for bytes that are not what they were
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError, EOFError),
    *(OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
PUSHED = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"),
}  # opcodes whose argument is the value
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: torch itself tells it by this member."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except DAMAGE:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor that is an attribute of the archived module or of a module in it: "<module>.<attribute>" -> tensor.

    These are parameters and buffers (TorchScript has no buffers that are not saved).

    Raises:
        ValueError: if the file is damaged, or of a form that TorchScript does not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = [n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl" and n.count("/") == 1]
            folder = PurePosixPath(index).parent
            if (order := str(folder / "byteorder")) in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
            root = _read_objects(archive.read(index))
            if not isinstance(root, _Object):
                raise ValueError("it holds no module")
            storages: dict[str, bytearray] = {}
            return {name: _tensor(archive, folder, tensor, storages) for name, tensor in _tensors(root, "", ())}
    except DAMAGE as error:
        raise ValueError(f"{path} is no TorchScript archive that can be read: {error}") from error


@dataclass
class _Name:
    """A class or function that the archive names; it is not looked up."""

    name: str


@dataclass
class _Object:
    """An instance of a class of the archive."""

    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Storage:
    """("storage", type, key, device, number of elements)."""

    entry: tuple[Any, ...]


@dataclass
class _Rebuilt:
    """The arguments of `_rebuild_tensor_v2`: storage, offset, size, stride, ..."""

    arguments: tuple[Any, ...]


_MARK = object()


def _read_objects(data: bytes) -> Any:
    """What a pickle of TorchScript's own writer (protocol 2) describes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        start = max(i for i, entry in enumerate(stack) if entry is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in PUSHED:
            stack.append(CONSTANTS.get(name, argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[cast(int, argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[cast(int, argument)])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in TUPLES:
            items = tuple(stack[-TUPLES[name] :])
            stack[-TUPLES[name] :] = [items]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "APPENDS":
            several = marked()
            stack[-1].extend(several)
        elif name == "SETITEMS":
            entries = marked()
            stack[-1].update(zip(entries[::2], entries[1::2], strict=True))
        elif name == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            stack[-1][key] = value
        elif name == "GLOBAL":
            stack.append(_Name(cast(str, argument)))
        elif name == "BINPERSID":
            stack.append(_Storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = stack[-2:]
            stack[-2:] = [_Rebuilt(arguments) if function == _Name(REBUILD) else None]  # no other is of interest
        elif name == "NEWOBJ":
            stack[-2:] = [_Object()]
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Object) and isinstance(state, dict):
                stack[-1].attributes.update(state)
        else:
            raise ValueError(f"data.pkl holds the opcode {name} at byte {position}, which TorchScript does not write")
    raise ValueError("data.pkl has no end")


def _tensors(module: _Object, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, _Rebuilt]]:
    if id(module) in above:
        raise ValueError(f"{prefix} holds itself")
    for name, value in module.attributes.items():
        if isinstance(value, _Rebuilt):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Object):
            yield from _tensors(value, f"{prefix}{name}.", (*above, id(module)))


def _tensor(
    archive: zipfile.ZipFile, folder: PurePosixPath, rebuilt: _Rebuilt, storages: dict[str, bytearray]
) -> Tensor:
    storage, offset, size, stride = rebuilt.arguments[:4]
    _, kind, key, _, count = storage.entry
    dtype = STORAGES[kind.name]
    if key not in storages:
        storages[key] = bytearray(archive.read(str(folder / "data" / key)))
    if len(storages[key]) < count * dtype.itemsize:
        raise ValueError(f"storage {key} has {len(storages[key])} bytes, not {count} numbers of {dtype}")
    numbers = torch.frombuffer(storages[key], dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
    return numbers.as_strided(size, stride, offset).clone()
