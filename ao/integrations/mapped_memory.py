"""Giving back the memory of files that are mapped, while they are read for the last time.

A loader that maps its files has, at the end, all of them in memory, beside the model: the pages stay with the process until
memory is short. That is harmless where nothing counts them, and the end of the process where a limit does.

There are two ways to give a page back. The process lets go of it, and it stays in the system's cache of files, for whoever
reads the file next: that costs next to nothing, and loses what the process has written to a page of a private mapping. Or the
system reclaims it, which loses nothing, takes ten times as long, and has the next reader wait for the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

DONTNEED = 4
"""MADV_DONTNEED of Linux: let go of the pages."""

PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4: reclaim the pages. What is read again later is read from the file again."""


class MappedFiles:
    """Files that another library has mapped, all of them before the first is read. On other systems than Linux, nothing happens.

    every: bytes of copies that may be made before the pages that they were made from are given back.
    kept: whether somebody keeps tensors that are mapped, and so may have written to them.
    """

    def __init__(self, paths: Iterable[str], every: int = 2**25, kept: bool = True) -> None:
        self.paths = {str(Path(path).resolve()) for path in paths} if sys.platform == "linux" else set()
        self.every = every
        self.kept = kept
        self.pending = 0
        self.mappings: list[tuple[int, int]] = []

    def read(self, t: Tensor) -> None:
        """`t` has been read for the last time. The pages of a tensor that is mapped are given back at once. Nobody knows whose
        pages a copy was made from: from time to time, those of all of the files are given back."""
        if not self.paths:
            return
        self.mappings = self.mappings or list(self._mappings())
        start, stop = t.data_ptr(), t.data_ptr() + t.nbytes
        if t.device.type == "cpu" and any(low <= start and stop <= high for low, high in self.mappings):
            page = mmap.PAGESIZE  # Those at the ends may be another tensor's, too.
            _advise(-(-start // page) * page, stop // page * page, DONTNEED)
            return
        self.pending += t.nbytes
        if self.pending >= self.every:
            self.pending = 0
            for low, high in self.mappings:
                _advise(low, high, PAGEOUT if self.kept else DONTNEED)
            if t.device.type == "cpu":
                _trim()

    def _mappings(self) -> Iterator[tuple[int, int]]:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            addresses, *_, path = line.split(maxsplit=5)
            if path.removesuffix(" (deleted)") in self.paths:
                start, _, stop = addresses.partition("-")
                yield int(start, 16), int(stop, 16)


def _advise(start: int, stop: int, advice: int) -> None:
    """madvise, which a kernel that does not know the advice refuses."""
    if start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _trim() -> None:
    """Let glibc give back what was freed. Copies that were freed lie between quantized tensors that stay, and it would keep half
    as much as the model takes; C libraries that do not know this call keep less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
