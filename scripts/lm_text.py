"""Text for language models: files to windows of tokens."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

STDLIB = "stdlib"
"""Stands for the modules of this Python's standard library."""

INSTALLED = "site-packages"
"""Stands for the modules of the packages that are installed for this Python."""

LARGEST = 60_000
"""Characters of a module, at most: beyond, they are tables."""


def texts_of(paths: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The texts of JSON lists of strings, of plain files, of folders (their .py, .txt and .md files), of "stdlib" and of
    "site-packages".

    exclude: names of packages and folders to leave out of folders. Raises FileNotFoundError and ValueError, with the path.
    """
    texts: list[str] = []
    for path in paths:
        place = Path(path)
        if path in (STDLIB, INSTALLED):
            texts += modules(Path(sysconfig.get_paths()["stdlib" if path == STDLIB else "purelib"]), exclude)
        elif place.is_dir():
            files = sorted(p for suffix in ("py", "txt", "md") for p in place.rglob(f"*.{suffix}"))
            files = [p for p in files if not set(exclude) & set(p.relative_to(place).parts)]
            if not files:
                raise ValueError(f"{place} has no .py, .txt or .md file")
            texts += readable(files)
        elif place.suffix == ".json":
            found = json.loads(place.read_text(encoding="utf-8"))
            if not (isinstance(found, list) and all(isinstance(t, str) for t in found)):
                raise ValueError(f"{place} must be a JSON list of strings")
            texts += found
        else:
            texts.append(place.read_text(encoding="utf-8"))
    return texts


def modules(root: Path, exclude: Sequence[str]) -> list[str]:
    """The modules below a folder, without tests and without large tables, in an order that is shuffled but always the same."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", *exclude}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    random.Random(0).shuffle(files)
    return readable(files, LARGEST)


def readable(files: Iterable[Path], largest: int | None = None) -> list[str]:
    """The texts of files that are UTF-8, and not too large."""
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text and (largest is None or len(text) <= largest):
            texts.append(text)
    return texts


def windows(
    texts: Sequence[str], tokenizer: Tokenizer, end: int | None, length: int, most: int | None = None
) -> Tensor:
    """The tokens of all texts, `end` after each, in windows: (windows, length) ids.

    most: at most so many windows, evenly spaced over the texts. Raises ValueError for less than one window.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for each in tokenizer.encode_batch(list(texts)):
        ids += each.ids + ([] if end is None else [end])
    count = len(ids) // length
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, and a window takes {length}; give more text")
    found = torch.tensor(ids[: count * length]).reshape(count, length)
    if most is None or count <= most:
        return found
    return found[torch.arange(most) * count // most]
