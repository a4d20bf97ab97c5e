"""Pictures for a page that stands alone: data URIs, and the thumbnails of what was retrieved."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def data_uri(content: bytes, media_type: str) -> str:
    """Content as a data URI, for example of type "image/png"."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def thumbnail_uris(folder: Path, item: int) -> list[str]:
    """The picture of a gallery item, or the frames of a clip in order; empty if there is none.

    Args:
        folder: the run's thumbnails, <item>.png for an image or <item>_0.png, <item>_1.png ... for a clip.
        item: row of the gallery. An integer and nothing else, so that no name in a file can lead out of the folder.

    Raises:
        ValueError: if item is not an integer.
    """
    if not isinstance(item, int) or isinstance(item, bool):
        raise ValueError(f"retrieved.json: expected an integer for item, the gallery row; received {item!r}")
    files = [folder / f"{item}.png"]
    if not files[0].is_file():
        files = []
        while (frame := folder / f"{item}_{len(files)}.png").is_file():
            files.append(frame)
    return [data_uri(file.read_bytes(), "image/png") for file in files]


def retrieved_cards(retrieved: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Each query of retrieved.json with its pictures: {"query", "found", "results": [{..., "rank", "frames"}]}.

    Args:
        retrieved: {"k": int, "queries": [{"direction": "t2i", "query": str, "results": [{"item", "score", "right"}]}]}.
        folder: the run's thumbnails.

    Raises:
        ValueError: for another direction than t2i, the one whose results are pictures, and as `thumbnail_uris`.
    """
    cards = []
    for query in retrieved["queries"]:
        if query["direction"] != "t2i":
            raise ValueError(f"retrieved.json: expected direction 't2i', pictures; received {query['direction']!r}")
        results = [
            {**result, "rank": rank, "frames": thumbnail_uris(folder, result["item"])}
            for rank, result in enumerate(query["results"], start=1)
        ]
        found = next((result["rank"] for result in results if result["right"]), None)
        cards.append({"query": query["query"], "found": found, "results": results})
    return cards
