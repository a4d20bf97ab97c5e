"""Put an adapter into a model, and show and count what trains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from adapters.base import Adapter, Branched, PenalizedAdapter, ScheduledAdapter
from adapters.encoder_layer import leave_fast_path, return_to_fast_path
from adapters.extend import Extension, restore

INJECTED = "_has_been_injected"  # on every module of a model that had an adapter injected, for good


@dataclass(frozen=True)
class Injection:
    """What `inject` did to a model; kept on it as `model.injection`, also when it has been merged."""

    adapter: Adapter
    train: tuple[str, ...]
    own: frozenset[str] = frozenset()
    """Names of the parameters that the adapter brought, or chose to train (biases, say); none for `full`."""
    merged: bool = False

    @property
    def whole(self) -> tuple[str, ...]:
        """The paths at and below which everything trains: `train`, and for `full` that of the model, ""."""
        return ("",) if self.adapter.name == "full" else self.train


def inject(model: nn.Module, adapter: Adapter, train: Iterable[str] = (), *, show: bool = False) -> nn.Module:
    """Freeze `model`, put `adapter` into it, and let the submodules or parameters named in `train` train too. In place.

    Args:
        model: any module that holds known architectures (see `adapters.targets`), at any depth.
        adapter: one of `ADAPTERS`, configured.
        train: paths of submodules or parameters that train besides the adapter, such as `("head",)`. A parameter that
            is tied to another one trains in both places.
        show: print `adapter_table(model)`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model, a part of it or a model that it is a part of holds an adapter already or had one
            merged into it, if a target is nowhere in it or a layer with a forward of its own, or if a name in `train`
            is unknown. Whatever is raised, nothing has changed then.
    """
    train = (train,) if isinstance(train, str) else tuple(train)
    compiled, model = model, uncompiled(model)
    check_fresh(model)
    before = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    before += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if unknown := [name for name in train if name not in before]:
        close = difflib.get_close_matches(unknown[0], before, n=3) or [n for n, _ in model.named_children()]
        raise ValueError(
            f"train={unknown[0]!r} names nothing in {type(model).__name__}; did you mean {', '.join(close)}?"
        )
    with unchanged_on_error(model):
        model.requires_grad_(False)
        adapter.apply(model)
        trains = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        held = Injection(adapter, train, frozenset() if adapter.name == "full" else trains)
        for parameter in parameters_below(model, train):
            parameter.requires_grad_(True)
        leave_fast_path(model)
        for module in model.modules():
            object.__setattr__(module, INJECTED, True)
        object.__setattr__(model, "injection", held)
        if show:
            print(adapter_table(model))
    return compiled


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """What is injected into a fresh model inside this context is taken out again if it ends in an error of any kind."""
    extended = {module for module in model.modules() if isinstance(module, Extension)}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module in list(model.modules()):
            if isinstance(module, Extension) and module not in extended:
                restore(module)
        return_to_fast_path(model)
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
        for module in model.modules():
            vars(module).pop(INJECTED, None)
        vars(model).pop("injection", None)
        raise


def check_fresh(model: nn.Module) -> None:
    """Raise ValueError if an adapter was injected into the model, into a part of it, or into what it is a part of."""
    held: Injection | None = getattr(model, "injection", None)
    if held is not None:
        why = "had its adapter merged into its weights" if held.merged else f"already holds {held.adapter}"
        raise ValueError(f"this {type(model).__name__} {why}; inject into a fresh model")
    if (path := next((name for name, module in model.named_modules() if INJECTED in vars(module)), None)) is not None:
        where = f"its {path}" if path else "what it is a part of"
        raise ValueError(
            f"this {type(model).__name__} is not fresh: an adapter was injected into {where}, where a second one would "
            "undo it; inject once, into the whole, with targets or patterns that reach all the layers"
        )


def is_below(name: str, paths: Iterable[str]) -> bool:
    """Whether a path is one of `paths` or below it; everything is below ""."""
    return any(not path or name == path or name.startswith(path + ".") for path in paths)


def parameters_below(model: nn.Module, paths: Iterable[str]) -> set[nn.Parameter]:
    """The parameters at or below one of `paths`, under whichever of its names if it is tied."""
    paths = tuple(paths)
    return {p for name, p in model.named_parameters(remove_duplicate=False) if is_below(name, paths)}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given, or `model` itself: names begin there, and so does what `inject` notes."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def injection(model: nn.Module) -> Injection | None:
    """What was injected into `model`, or None where nothing was or it has been merged."""
    held: Injection | None = getattr(model, "injection", None)
    return None if held is None or held.merged else held


def injections(model: nn.Module) -> list[tuple[nn.Module, Injection]]:
    """The modules that something was injected into, `model` itself or parts of it, with what that was."""
    found = [(module, vars(module).get("injection")) for module in model.modules()]
    return [(module, held) for module, held in found if isinstance(held, Injection) and not held.merged]


def trained_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What an injection into `model` itself trains, frozen by hand or not; nothing where there is none."""
    if (held := injection(model)) is None:
        return set()
    return {p for name, p in model.named_parameters() if name in held.own} | parameters_below(model, held.whole)


def loss_parts(model: nn.Module) -> dict[str, Tensor]:
    """The own parts of a training loss of all adapters in `model`, weighted, by name (see `PenalizedAdapter`).

    Those of equal name are summed; {} where there is none.
    """
    parts: dict[str, Tensor] = {}
    for module, held in injections(model):
        if isinstance(held.adapter, PenalizedAdapter):
            for name, part in held.adapter.loss_parts(module).items():
                parts[name] = parts[name] + part if name in parts else part
    return parts


def after_step(model: nn.Module, step: int, total_steps: int) -> None:
    """Tell all adapters in `model` that the optimiser took its step number `step`, before gradients are cleared.

    Nothing happens where an adapter is no `ScheduledAdapter`. `training.ReSoRAMixin` calls this and `loss_parts`; a
    training loop without it has to.
    """
    for module, held in injections(model):
        if isinstance(held.adapter, ScheduledAdapter):
            held.adapter.after_step(module, step, total_steps)


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that train; a parameter that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """The names of the parameters of all adapters in `model`: not what `train` named, and none for `full`."""
    own = {p for module, held in injections(model) for name, p in module.named_parameters() if name in held.own}
    return {name for name, parameter in model.named_parameters() if parameter in own}


def adapter_table(model: nn.Module) -> str:
    """What trains in `model`, for people: a line for each low-rank update, and one for each other module with its own.

    Columns: module and role, shape of the linear map (d_in -> d_out), rank, parameters. Parameters that several layers
    share are counted where they stand first.
    """
    rows = [("layer", "shape", "rank", "parameters")]
    counted: set[int] = set()

    def count(parameters: Iterable[nn.Parameter]) -> int:
        new = [p for p in parameters if p.requires_grad and id(p) not in counted]
        counted.update(map(id, new))
        return sum(p.numel() for p in new)

    for name, module in model.named_modules():
        if isinstance(module, Branched):
            d_in = module.linear_map()[0].shape[1]
            for role, branch in module.branches.items():
                start, stop = module.slices[role]
                rank = len(module.weight_subspaces(role)[1])
                rows.append(
                    (f"{name}.{role}", f"{d_in} -> {stop - start}", str(rank), f"{count(branch.parameters()):,}")
                )
    for name, module in model.named_modules():
        if own := count(module.parameters(recurse=False)):
            rows.append((name or type(model).__name__, "", "", f"{own:,}"))
    rows.append(("total", "", "", f"{trainable_parameters(model):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    )
