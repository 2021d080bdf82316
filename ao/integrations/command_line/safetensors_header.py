"""What a safetensors file holds, from its header alone: no weight is read, and no library is needed.

A file begins with 8 bytes, the length of a JSON text; then the text, {name: {"dtype", "shape", "data_offsets"}} and str
to str under "__metadata__"; then the data, to which the offsets refer.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST = 100_000_000
"""The longest header that the format allows, in bytes."""


@dataclass(frozen=True)
class Stored:
    """One stored tensor: its dtype as safetensors names it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata of a file and its stored tensors, by name.

    Raises FileNotFoundError, and ValueError for a file that is no safetensors file or is cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no ordinary file" if path.exists() else f"there is no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST + 1
        text = file.read(length) if length <= _LONGEST else b""
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        begin = 8 + length
        tensors = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no safetensors file; give a .safetensors file or a folder that has some"
        ) from error
    end = max((t.stop for t in tensors.values()), default=begin)
    if end > size:
        raise ValueError(f"{path} is cut short: its header tells of {end:,} bytes, it has {size:,}; copy it again")
    return metadata, tensors


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or those that a folder's `model.safetensors` or index name,
    else all that the folder has. Raises FileNotFoundError where there are none, ValueError for a broken index."""
    if not path.is_dir():
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if (path / INDEX).exists():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / INDEX} is no index of shards; copy or save it again") from error
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(each.name for end in ("bin", "pt", "pth") for each in path.glob(f"*.{end}"))
        raise FileNotFoundError(
            f"{path} has no *.safetensors; "
            + (
                f"it has {others[0]}, which is a pickle, and ao reads none: load the model with transformers and call "
                "save_pretrained(), which writes safetensors"
                if others
                else "give a .safetensors file or a model folder"
            )
        )
    return files
