"""What long work says of itself: a progress bar while it goes on, and what `quantize_` did, as a value that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..dtypes import QTensor

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


@dataclass(frozen=True)
class Row:
    """One quantized parameter: its full name, shape, format, bytes before and after, and the recipe that found its codes."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    algorithm: str = "rtn"

    @property
    def label(self) -> str:
        """The format, and the recipe if it is not round-to-nearest."""
        return self.format if self.algorithm == "rtn" else f"{self.format}, {self.algorithm}"


@dataclass
class Report:
    """The parameters that `quantize_` quantized, and those that it passed over.

    rows: the quantized parameters; a tied one has one row.
    skipped: full name -> why, of every other parameter that is a matrix or has more than 1,000 elements, and of weights that
        are buffers.
    notes: what else the user should know, such as a tie.
    model_bytes: of all parameters and buffers of the model as they are without quantization, in their dtypes.
    quantized_bytes: of those that are quantized now, by this call or an earlier one, as they are without.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model_bytes: int = 0
    quantized_bytes: int = 0

    def measure(self, model: nn.Module) -> None:
        """Count the bytes of a model, and of what is quantized in it."""
        found = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        sizes = [(t.numel() * t.dtype.itemsize, isinstance(t, QTensor)) for t in found]
        self.model_bytes = sum(size for size, _ in sizes)
        self.quantized_bytes = sum(size for size, quantized in sizes if quantized)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantized parameters before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized parameters after, every field counted."""
        return sum(row.bytes_after for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        groups: dict[tuple[str, tuple[int, ...]], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.label, row.shape), []).append(row)
        lines = [("format", "shape", "layers", "bytes before", "bytes after", "ratio")]
        for (form, shape), rows in groups.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            size = " x ".join(map(str, shape))
            lines.append((form, size, str(len(rows)), f"{before:,}", f"{after:,}", f"{after / max(before, 1):.3f}"))
        total = f"{self.bytes_after / max(self.bytes_before, 1):.3f}"
        lines.append(("total", "", str(len(self.rows)), f"{self.bytes_before:,}", f"{self.bytes_after:,}", total))
        text = [*aligned(lines), *by_reason(self.skipped), *self.notes]
        if self.model_bytes:
            share = self.quantized_bytes / self.model_bytes
            text.append(f"quantized: {share:.1%} of the {self.model_bytes:,} bytes of the model")
        return "\n".join(line.rstrip() for line in text)


LONGEST = 44
"""Characters of the first column of a table: what is longer, such as a format with its activation's, has a line of its own."""


def aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table, a rule below the first; numbers, from the third column on, to the right."""
    rows: list[tuple[str, ...]] = []
    for above, line in zip([(), *lines], lines):
        if len(line[0]) > LONGEST:
            rows += [] if above and above[0] == line[0] else [(line[0],)]
            line = ("", *line[1:])
        rows.append(line)
    whole = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in whole) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows]
    return [text[0], "-" * len(text[0]), *text[1:]]


def by_reason(skipped: Mapping[str, str]) -> list[str]:
    """A line for each reason why something was passed over, with the first names."""
    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    lines = []
    for why, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"skipped {len(names)}: {shown}: {why}")
    return lines


def storage_bytes(t: Tensor) -> int:
    """Bytes that a tensor stores: all fields of a QTensor, or elements times their size."""
    return t.nbytes_packed if isinstance(t, QTensor) else t.numel() * t.element_size()


def get_model_size_in_bytes(model: nn.Module, ignore_embeddings: bool = False) -> int:
    """Bytes of all parameters and buffers, packed sizes for quantized ones, tied ones counted once.

    ignore_embeddings: leave out the weights of `nn.Embedding` layers (unless another layer shares them).
    """
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        if ignore_embeddings and isinstance(module, nn.Embedding):
            continue
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            seen[id(t)] = t
    return sum(storage_bytes(t) for t in seen.values())


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """Signal to quantization noise of `y` against the reference `x`, in dB: 20 log10(|x| / |x - y|)."""
    x, y = x.float(), y.float()
    return 20 * torch.log10(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(x - y))
