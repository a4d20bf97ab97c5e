"""What the side networks LST and UniPT share: where they work, and how wide their output may be."""

from __future__ import annotations

from adapters.towers import Tower

ONE_WIDTH = ("bert", "vit", "clip_vision", "clip_text")  # kinds of towers whose tokens go all the way in one width


def output_width(tower: Tower, output_dim: int | None, method: str) -> int:
    """Channels of what replaces the output of a tower's last block; `output_dim` None means the tower's own.

    Raises:
        ValueError: if what follows inside the tower takes the tower's own width only.
    """
    if output_dim in (None, tower.width):
        return tower.width
    follows = "the final norm"
    if tower.kind == "bert":
        if getattr(tower.module, "pooler", None) is None:
            return int(output_dim or tower.width)
        follows = "its pooler (build it with add_pooling_layer=False)"
    raise ValueError(
        f"{method} with output_dim={output_dim}: in {tower.name or 'the model'} {follows} takes {tower.width} "
        f"channels; leave output_dim out"
    )
