"""A parameter with its states as rows of one block each, and how a step reads and writes them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import Float8, Mapped, QTensor, Spec

from .stochastic_rounding import stochastic_round_e4m3

Fields = tuple[Tensor, ...]
"""A state: itself if it is in full precision, else the fields of its QTensor of shape (rows, block)."""

CHUNK = 32
"""The elements in which codes of less than a byte are packed (ao/dtypes/bits.py): plane by plane."""


@dataclass
class Rows:
    """One parameter, or a piece of it, as rows of blocks, or of single elements where its states are in full precision.

    params, grads: by plane (see below), mostly one. noise: int32 (seed, position of the first element), where parameters are
    rounded stochastically.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Fields]
    noise: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them, one after the other."""
        noise = [] if self.noise is None else [self.noise]
        return [*self.params, *self.grads, *(t for fields in self.states for t in fields), *noise]

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and the elements of a row."""
        rows = self.params[0].shape[0]
        return rows, self.params[0].numel() * len(self.params) // max(rows, 1)


def row(spec: Spec, device: torch.device) -> QTensor:
    """One row of zeros."""
    return spec.quantize(torch.zeros(1, spec.block[-1], dtype=torch.float32, device=device))


@functools.cache
def field_names(spec: Spec) -> tuple[str, ...]:
    """The fields of rows that `spec` quantizes."""
    return tuple(row(spec, torch.device("cpu")).fields())


# Planes. Two codes of four bits share a byte: elements k and k + 16 of a chunk of 32. A step over whole rows would have to
# bring together what two threads of a GPU have made, by way of memory. So it goes over planes: what is in the low halves of
# the bytes, and what is in the high ones, each a view of shape (rows, K / 32, 16). Nothing changes its shape on the way, so
# that a compiler makes one kernel of it all.


@functools.cache
def planes_of(specs: tuple[Spec | None, ...]) -> int:
    """How many planes there are: 1, or 2 for states of 4 bits."""
    if not specs or not all(isinstance(spec, Mapped) and spec.bits == 4 for spec in specs):
        return 1
    return 1 if any(spec.block[-1] % CHUNK for spec in specs) else 2  # type: ignore[union-attr]


def to_planes(t: Tensor, width: int | None, planes: int) -> Sequence[Tensor]:
    """Planes of a contiguous tensor's rows of `width` elements; (rows, width) if there is one plane, (n,) without rows."""
    if width is None:
        return [t.view(-1)]
    if planes == 1:
        return [t.view(-1, width)]
    return t.view(-1, width // CHUNK, planes, CHUNK // planes).unbind(2)


def state_fields(state: QTensor, planes: int) -> Fields:
    """The fields of a state of shape (rows, K), as `read` and `write` take them."""
    fields = [getattr(state, name) for name in field_names(state.spec)]
    # On a CPU as bytes: compilers have no view of float8 there.
    fields = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn and t.device.type == "cpu" else t for t in fields]
    return tuple(fields if planes == 1 else (t.view(t.shape[0], -1, min(t.shape[1], CHUNK // planes)) for t in fields))


def read(spec: Spec | None, fields: Fields, params: Sequence[Tensor]) -> list[Tensor]:
    """The values of a state, float32, by plane. params: of the same shapes."""
    if spec is None:
        return [fields[0]]
    named = dict(zip(field_names(spec), fields))
    if isinstance(spec, Float8) and named["qdata"].dtype == torch.uint8:
        if _for_a_cpu(named["qdata"]):
            return [spec.numbers(named["qdata"]) * named["scale"]]
        named["qdata"] = named["qdata"].view(spec.dtype)
    if not isinstance(spec, Mapped) or (spec.bits < 8 and len(params) == 1):  # several codes in a byte
        return [spec.wrap(named, torch.float32, params[0].shape).decode()]
    if len(params) == 1:
        return [spec.entries(named["qdata"]) * named["scale"]]
    # In 32 bits: vectors have no shifts of bytes.
    return [spec.entries((named["qdata"].to(torch.int32) >> 4 * i) & 15) * named["scale"] for i in range(len(params))]


def scales(spec: Spec | None, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The qparams of a state that becomes `values`, given by plane, and `inverse`, 1 / scale, where `write` wants it."""
    if spec is None:
        return {}
    if not isinstance(spec, Mapped) or (spec.bits < 8 and len(values) == 1):
        known = dict(spec.choose_qparams(values[0], spec.grid(values[0].shape)))
    else:
        known = {"scale": spec.scale(_largest(values))}
    if isinstance(spec, (Mapped, Float8)):
        # 1 / scale, and 0 for 0: the device's own, which on a GPU is off by a bit and costs less than `rounding.reciprocal`.
        scale = known["scale"]
        inverse = scale.reciprocal().masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)
        known["inverse"] = in_memory(inverse)  # else computed anew for every few elements
    return known


def write(
    spec: Spec | None, fields: Fields, values: Sequence[Tensor], known: Mapping[str, Tensor], slow: bool = False
) -> None:
    """Quantize `values`, given by plane, into a state.

    known: what `scales` gave for them. slow: a mean that moves little at a time; e4m3 then rounds unbiased.
    """
    if spec is None:
        fields[0].copy_(values[0])
        return
    made: dict[str, Any]
    if isinstance(spec, Mapped) and (spec.bits == 8 or len(values) > 1):
        codes = [spec.nearest(x * known["inverse"]) for x in values]
        codes = [codes[0], *(c << 4 * i for i, c in enumerate(codes[1:], 1))]
        made = {"scale": known["scale"], "qdata": functools.reduce(torch.bitwise_or, codes).to(torch.uint8)}
    elif isinstance(spec, Float8) and spec.format == "e4m3":
        q = (values[0] * known["inverse"]).clamp(-spec.max, spec.max)
        q = stochastic_round_e4m3(q) if slow else q
        qdata = spec.codes(q).to(torch.uint8) if _for_a_cpu(q) else q.to(spec.dtype)
        made = {"scale": known["scale"], "qdata": qdata.view(fields[0].dtype)}
    else:
        made = dict(spec.encode(values[0], **known))
    for name, target in zip(field_names(spec), fields):
        if spec.tensor_type.roles[name] != "shared":
            target.copy_(made[name])


def _largest(planes: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of each row, (rows, 1) or of planes (rows, 1, 1)."""
    sizes = [x.abs() for x in planes]
    inside = tuple(range(1, planes[0].dim()))
    if sizes[0].device.type == "cpu":
        return functools.reduce(torch.maximum, sizes).amax(inside, keepdim=True)
    # Bits are ordered as the numbers are, with NaN above all (ao/dtypes/blocks.py).
    return functools.reduce(torch.maximum, (x.view(torch.int32) for x in sizes)).amax(inside, True).view(torch.float32)


def in_memory(x: Tensor) -> Tensor:
    """`x` as memory of its own, in code that is compiled for a CPU: no compiler sees through this."""
    return x.as_strided(x.shape, x.stride()) if x.device.type == "cpu" else x


def reading(x: Tensor, others: Iterable[Tensor]) -> Tensor:
    """`x`, in code that is compiled for a CPU by way of an operator that reads `others`, which broadcast to it, as well.

    What reads the same is computed in the same loop, and what reads a result in a loop after it.
    """
    if not _for_a_cpu(x):
        return x
    bits = x.view(torch.int32)
    for other in others:
        bits = bits | (other.view(torch.int32) & 0)
    return bits.view(torch.float32)


def _for_a_cpu(x: Tensor) -> bool:
    """Whether code is traced that a compiler will make for a CPU."""
    return x.device.type == "cpu" and torch._C._len_torch_dispatch_stack() > 0
