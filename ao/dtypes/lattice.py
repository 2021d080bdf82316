"""Where a QTensor can be cut, and where it can be written: one rule, read off the shapes of its fields.

A packed field can be cut between its chunks. A block can be taken whole, or a range inside of a single one, which then
shares the qparams of that block with elements outside of the range: it can be read, and not be written. Both hold for the
fields of a field as well: a block of scales that are themselves quantized is a block of all the elements under them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import QTensor


@dataclass(frozen=True)
class Lattice:
    """The places of one dim at which a QTensor can be cut.

    size: of the dim.
    chunk: the elements of a packed chunk; the last one may be shorter.
    blocks: the elements of a block, for each field and each field of a field that has blocks of more than one.
    grain: what the size of a packed dim is a multiple of.
    """

    size: int
    chunk: int = 1
    blocks: tuple[int, ...] = ()
    grain: int = 1

    @property
    def cut(self) -> int:
        """A view may begin and end at every multiple of this."""
        return math.lcm(self.chunk, *(b for b in self.blocks if b < self.size))

    @property
    def whole(self) -> int:
        """A view that begins and ends at multiples of this takes blocks whole, so that it can be written anew."""
        return min(math.lcm(self.chunk, *self.blocks), max(self.size, 1))

    def can_cut(self, start: int, stop: int) -> bool:
        """Whether there is a view of [start, stop)."""
        return self._aligned(self.chunk, start, stop) and all(
            self._aligned(b, start, stop) or (start < stop and start // b == (stop - 1) // b) for b in self.blocks
        )

    def can_write(self, start: int, stop: int) -> bool:
        """Whether [start, stop) takes blocks whole or not at all."""
        return all(self._aligned(b, start, stop) for b in self.blocks)

    def can_step(self, step: int) -> bool:
        """Whether there is a view of every `step`-th element."""
        return self.chunk == 1 and all(b == self.size or step % b == 0 for b in self.blocks)

    def can_be(self, size: int) -> bool:
        """Whether the dim of another tensor with these chunks and blocks can have `size` elements."""
        return size % self.grain == 0 and all(b == self.size or size % b == 0 for b in self.blocks)

    def _aligned(self, unit: int, start: int, stop: int) -> bool:
        return unit == 1 or (start % unit == 0 and (stop % unit == 0 or stop == self.size))


def lattice(q: QTensor, dim: int) -> Lattice:
    """Where dim `dim` of `q` can be cut. Raises NotImplementedError where a field is in a private layout (`Opaque`)."""
    size = q.shape[dim]
    chunk, grain, blocks = 1, 1, []
    for name, t in q.fields().items():
        role = q.roles[name]
        if role == "opaque":
            raise opaque(q, name)
        if role == "shared":
            continue
        f = t.shape[dim]
        each = size // f if f else 1  # elements to one entry of the field
        if role == "elements" and f != size:
            chunk, grain = math.lcm(chunk, q.unit), math.lcm(grain, q.grain)
        elif each > 1 and not (
            name == "pre_scale" and f == 1
        ):  # A multiplier is not chosen anew when a view is written.
            blocks.append(each)
        if hasattr(t, "roles"):  # A QTensor; base.py asks this file, which so cannot import it.
            inner = lattice(t, dim)  # type: ignore[arg-type]
            chunk = math.lcm(chunk, each * inner.chunk) if inner.chunk > 1 else chunk
            grain = math.lcm(grain, each * inner.grain) if inner.chunk > 1 else grain
            blocks += [each * b for b in inner.blocks]
    return Lattice(size, chunk, tuple(blocks), grain)


def opaque(q: QTensor, name: str) -> NotImplementedError:
    """The error for an op on the dims of a field that is in a private layout."""
    return NotImplementedError(
        f"{type(q).__name__}.{name} is in a device-specific layout that cannot be cut or reordered; "
        "do this before quantizing, or quantize with the default layout"
    )
