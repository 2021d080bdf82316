"""Progress on standard error, for people: where it is a terminal and tqdm is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, what: str, hidden: bool, unit: str = "B") -> Iterator[Callable[[int], object] | None]:
    """A bar with the time left, on a terminal and with tqdm; gives the function that advances it."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield None
        return
    off = hidden or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=off, leave=False) as bar:
        yield bar.update


def quiet_loading(hidden: bool) -> None:
    """Without transformers' own bar where nobody watches."""
    from transformers.utils import logging

    if hidden or not sys.stderr.isatty():
        logging.disable_progress_bar()
