"""FacT: factor-tuning, TT and TK (Jie and Deng, AAAI 2023, https://arxiv.org/abs/2212.03145)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import Branch, branch_tensors, stored_pair
from adapters.targets import ROLES, Site, adapt, find_sites


@dataclass(frozen=True, kw_only=True)
class FacT:
    r"""What FacT-TT and FacT-TK share: all updates of a list of blocks are made of one U and one V.

    Every linear map of a block is cut into d x d parts, d the width of the residual stream: q, k, v, o; fc1 into blocks
    of outputs ("fc1_0", "fc1_1", ...); fc2 into blocks of inputs, whose updates add up. Part c gains

    .. math:: \Delta y = s \; \mathrm{dropout}(x U^T S_c) V^T

    with U (r, d), V (d, r) and a small S_c (r, r) of its own. U and V are shared by the blocks that stand in one list:
    all of a ViT or a BERT, those of one tower in CLIP, of one stage in Swin and ConvNeXt (which has fc1 and fc2 only).
    U starts uniform in +-1/sqrt(d), V at zero, so that the adapted model starts as the backbone.

    Args:
        rank: r. The paper chooses it per data set, up to 16 for TT and up to 32 for TK; these are the defaults.
        scale: s. The paper chooses it per data set out of 0.01, 0.1, 1, 10, 100. Default: 1.
        dropout: probability of dropping one of the r activations of a sample in training. Default: 0.1, as in the
            authors' code.

    Raises:
        ValueError: for a rank below 1, a scale that is not positive or a dropout outside [0, 1).
    """

    name: ClassVar[str]
    not_mergeable: ClassVar[str] = ""
    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.scale <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{self.name} needs rank >= 1, scale > 0 and 0 <= dropout < 1, "
                f"but got rank={self.rank}, scale={self.scale}, dropout={self.dropout}"
            )

    def shared(self, width: int) -> Shared:
        """What one list of blocks shares."""
        return Shared(width, self.rank)

    def branch(self, shared: Shared, inputs: int, columns: int) -> Branch:
        """The update of one part with `inputs` blocks of inputs; its list of blocks has `columns` S_c in all."""
        raise NotImplementedError

    def stored_inputs(self, tensors: Mapping[str, Tensor]) -> int:
        """A branch's tensors by name -> the number of its blocks of inputs."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> None:
        for name, sites in _lists(self.name, model).items():
            parts = _parts(self.name, name, sites)
            shared = self.shared(_width(parts[0].site))
            columns = sum(part.inputs for part in parts)
            for part in parts:
                adapt(part.site, self.branch(shared, part.inputs, columns), part.role, part.rows)

    def stored_subspaces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """See `LowRankAdapter`: activations = s U^T S_c (d_in, r), one block of inputs below the other, basis = V^T."""
        parts = branch_tensors(tensors)
        shared = {_list_of(name): part for name, part in parts.items() if "shared.U" in part}  # once in the file

        def pair(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            width, inputs = len(part["shared.V"]), self.stored_inputs(part)
            return stored_pair(lambda: self.branch(self.shared(width), inputs, inputs), part)

        return {name: pair(shared[_list_of(name)] | part) for name, part in parts.items()}


@dataclass(frozen=True, kw_only=True)
class FacTTT(FacT):
    """FacT in tensor-train form: each S_c is trained as it is.

    2 d r + 12 L r^2 parameters in L transformer blocks with an MLP of 4 d: 61,440 in ViT-B at rank 16. S_c starts as an
    `nn.Linear` does, uniform in +-1/sqrt(k r), k = 1 or fc2's number of input blocks. The settings are those of `FacT`.
    """

    name: ClassVar[str] = "fact_tt"

    def branch(self, shared: Shared, inputs: int, columns: int) -> Branch:
        return TTBranch(shared, inputs, self)

    def stored_inputs(self, tensors: Mapping[str, Tensor]) -> int:
        return tensors["S"].shape[1] // self.rank


@dataclass(frozen=True, kw_only=True)
class FacTTK(FacT):
    r"""FacT in Tucker form: :math:`S_c = \sum_p C_{:,:,p} P_{p,c}`, with one core C (r, r, r) for a list of blocks.

    2 d r + r^3 + 12 L r parameters in L transformer blocks with an MLP of 4 d: 86,528 in ViT-B at rank 32. C starts
    uniform in +-sqrt(3)/r and P (r, columns) in +-sqrt(6 / (r + columns)), Xavier's bounds. The settings are those of
    `FacT`.

    The columns of P stand where they are used, one with each part (fc2 has one for each block of inputs): they train
    alike, a step gathers no gradients of slices, and a file says which layers it is for.

    The released code differs: it reshapes the S_c of fc1 and of fc2 from (r, r, 4) to (r, 4 r) without a permutation,
    so that their entries are interleaved. Here each block has the S_c of the formula; the counts are the same.
    """

    name: ClassVar[str] = "fact_tk"
    rank: int = 32

    def shared(self, width: int) -> SharedCore:
        return SharedCore(width, self.rank)

    def branch(self, shared: Shared, inputs: int, columns: int) -> Branch:
        return TKBranch(shared, inputs, columns, self)

    def stored_inputs(self, tensors: Mapping[str, Tensor]) -> int:
        return tensors["P"].shape[1]


class Shared(nn.Module):
    """U (r, d) and V (d, r) of a list of blocks.

    A module, not parameters on each branch: a module that several parents hold stays one in deep copies and through
    `to` and `float`, where parameters that have to be replaced (from the meta device, say) would part.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(rank, width))
        self.V = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.U, a=math.sqrt(5))


class SharedCore(Shared):
    """U, V and the core C (r, r, r)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        self.C = nn.Parameter(torch.empty(rank, rank, rank))
        nn.init.xavier_uniform_(self.C)


class FacTBranch(Branch):
    """The update of one part of a linear map: what is shared, and a parameter of its own."""

    def __init__(self, shared: Shared, config: FacT) -> None:
        super().__init__()
        self.shared, self.scale, self.dropout = shared, config.scale, config.dropout

    def mixing(self) -> Tensor:
        """The S_c below one another: (k r, r)."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, k d) = s [S_1^T U, ..., S_k^T U], basis (r, d) = V^T.

        The product with the inputs is one for all parts of a layer; to form S_k^T U first costs what a few samples do.
        """
        mixing = self.mixing().unflatten(0, (-1, len(self.shared.U)))  # (k, r, r)
        down = (mixing.mT @ self.shared.U) * self.scale  # (k, r, d)
        return down.transpose(0, 1).flatten(1), self.shared.V.T

    def activations(self, x: Tensor, down: Tensor) -> Tensor:
        """x (N, k d), down (r, k d) -> (N, r) = dropout(x down^T): not the inputs are dropped."""
        return F.dropout(F.linear(x, down), self.dropout, self.training)


class TTBranch(FacTBranch):
    """S (r, k r), as the weight of an `nn.Linear`."""

    def __init__(self, shared: Shared, inputs: int, config: FacT) -> None:
        super().__init__(shared, config)
        self.S = nn.Parameter(torch.empty(config.rank, inputs * config.rank))
        nn.init.kaiming_uniform_(self.S, a=math.sqrt(5))

    def mixing(self) -> Tensor:
        return self.S.T


class TKBranch(FacTBranch):
    """P (r, k): its columns of the paper's P."""

    shared: SharedCore

    def __init__(self, shared: Shared, inputs: int, columns: int, config: FacT) -> None:
        super().__init__(shared, config)
        self.P = nn.Parameter(torch.empty(config.rank, inputs))
        bound = math.sqrt(6 / (config.rank + columns))
        nn.init.uniform_(self.P, -bound, bound)

    def mixing(self) -> Tensor:
        """The k matrices sum_p C[:, :, p] P[p, c], below one another: (k r, r)."""
        return (self.shared.C @ self.P).permute(2, 0, 1).flatten(0, 1)


class Part(NamedTuple):
    """A slice of a linear map that writes d outputs.

    `rows` of the weight, under `role`; `inputs` is the number of its blocks of d inputs.
    """

    site: Site
    role: str
    rows: tuple[int, int]
    inputs: int


def _list_of(name: str) -> str | None:
    """The list of blocks that a layer stands in, by its path: "layers.1.blocks.0.attn.qkv" -> "layers.1.blocks."."""
    found = re.match(r"(.*\.|)\d+\.", name)
    return found and found[1]


def _lists(method: str, model: nn.Module) -> dict[str, list[Site]]:
    """The sites of each list of blocks; what stands in none, such as a pooling head's MLP, is left out."""
    lists: dict[str, list[Site]] = {}
    try:
        sites = find_sites(model, rf"\.({'|'.join(ROLES)})$")  # all that are there: ConvNeXt has no q, k, v and o
    except ValueError:
        sites = []
    for site in sites:
        if site.role in ROLES and (name := _list_of(site.name)) is not None:
            lists.setdefault(name, []).append(site)
    if not lists:
        raise ValueError(
            f"{method} works on the blocks of BERT, CLIP, ViT, Swin and ConvNeXt, but {type(model).__name__} has no "
            f"list of blocks with layers that are known as {', '.join(ROLES)}"
        )
    return lists


def _width(site: Site) -> int:
    """The width of the residual stream that the site reads from or writes to."""
    return site.d_out if site.role in ("o", "fc2") else site.d_in


def _parts(method: str, name: str, sites: list[Site]) -> list[Part]:
    if len(widths := {_width(site) for site in sites}) > 1:
        raise ValueError(
            f"{method} shares factors among the blocks of {name!r}, which need one width, but have {sorted(widths)}"
        )
    width, parts = widths.pop(), []
    for site in sites:
        if site.d_in % width or site.d_out % width:
            raise ValueError(
                f"{method} cuts a layer into parts of the blocks' width {width}, but {site.key} maps {site.d_in} to "
                f"{site.d_out} channels; expected multiples of {width}"
            )
        count = site.d_out // width
        for i in range(count):
            start = site.start + i * width
            role = f"{site.role}_{i}" if count > 1 else site.role
            parts.append(Part(site, role, (start, start + width), site.d_in // width))
    return parts
