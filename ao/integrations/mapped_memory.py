"""Giving back the memory of files that are mapped, while they are read for the last time.

A loader that maps its files has, at the end, all of them in memory, beside the model: the pages stay with the process until
memory is short. That is harmless where nothing counts them, and the end of the process where a limit does.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4: reclaim the pages. What is read again later is read from the file again; nothing is lost."""


class MappedFiles:
    """Files that another library has mapped. On other systems than Linux, nothing happens.

    every: bytes that may be read before their pages are given back.
    stay: whether all of them stay mapped where they are, so that it is enough to look once: a process that uses a GPU has
        thousands of other mappings, and a large model gives memory back hundreds of times.
    """

    def __init__(self, paths: Iterable[str], every: int = 2**25, stay: bool = False) -> None:
        self.paths = {str(Path(path).resolve()) for path in paths} if sys.platform == "linux" else set()
        self.every = every
        self.pending = 0
        self.stay = stay
        self.mappings: list[tuple[int, int]] = []

    def read(self, nbytes: int) -> None:
        """So many bytes have been read and are not needed any more."""
        self.pending += nbytes
        if self.pending >= self.every:
            self.release()

    def release(self) -> None:
        """Give back what has been read."""
        self.pending = 0
        if not (self.stay and self.mappings):
            self.mappings = list(self._mappings())
        for start, stop in self.mappings:
            # An advice, which a kernel that does not know it refuses.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), PAGEOUT)

    def _mappings(self) -> Iterator[tuple[int, int]]:
        if not self.paths:
            return
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            addresses, *_, path = line.split(maxsplit=5)
            if path.removesuffix(" (deleted)") in self.paths:
                start, _, stop = addresses.partition("-")
                yield int(start, 16), int(stop, 16)
