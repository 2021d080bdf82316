"""The tensors of safetensors files, by name: each is mapped, and read when it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .command_line.safetensors_header import read_header


class StoredTensors:
    """Open files, as a context manager.

    files: their paths. names: of all tensors, with the file of each. metadata: of each file.
    progress: called with the bytes of every tensor that is read.

    Raises FileNotFoundError for a file that is not there, and ValueError for one that is no safetensors file or is cut short.
    """

    def __init__(self, files: Iterable[Path], progress: Callable[[int], object] | None = None) -> None:
        self.files = list(files)
        self.progress = progress
        self.names: dict[str, Path] = {}
        self.metadata: list[dict[str, str]] = []
        self.starts: dict[str, int] = {}
        for file in self.files:
            metadata, tensors = read_header(file)
            self.metadata.append(metadata)
            self.names |= dict.fromkeys(tensors, file)
            self.starts |= {name: t.start for name, t in tensors.items()}
        self.open: dict[Path, Any] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> StoredTensors:
        from safetensors import safe_open

        self.open = {file: self.stack.enter_context(safe_open(file, framework="pt")) for file in self.files}
        return self

    def __exit__(self, *args: Any) -> None:
        self.stack.close()

    def get(self, name: str) -> Tensor:
        """A tensor."""
        t: Tensor = self.open[self.names[name]].get_tensor(name)
        if self.progress is not None:
            self.progress(t.nbytes)
        return t

    def in_order(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, in the order in which they lie in the files."""
        places = {file: i for i, file in enumerate(self.files)}
        for name in sorted(self.names, key=lambda name: (places[self.names[name]], self.starts[name])):
            yield name, self.get(name)


def only_safetensors(files: Iterable[str]) -> list[Path]:
    """The paths of files. Raises ValueError for one that is no safetensors file by its name: it may be a pickle."""
    paths = list(map(Path, files))
    for path in paths:
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file, and ao reads no others; save the model again")
    return paths
