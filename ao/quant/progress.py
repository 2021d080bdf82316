"""A progress bar for long work: tqdm when it is installed and somebody watches, else nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate over `items` under a bar that says `what`; it appears after a second of work, on a terminal only."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from tqdm(items, desc=what, total=total, disable=None, delay=1.0, leave=False)
