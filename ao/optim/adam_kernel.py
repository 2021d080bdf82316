"""One launch of a Triton kernel for the step of Adam of all parameters whose states are codes into maps, on an NVIDIA GPU.

The parameters of a model lie where they lie; a table of addresses says where, and another one which of them a program works on.
So the host prepares a list of gradients and launches once, however many parameters there are.

A program takes some rows of one parameter: it looks the states up (code_tables.py), computes the rule of adam.py in float32 in
the same order, finds the largest number of each row and writes the codes next to the new states. 4-bit codes are read and
written by planes, as in rows.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ao.dtypes import Mapped

from .adam import adam
from .code_tables import CodeTables, code_tables
from .kernel import Plan
from .parts import Large
from .rows import CHUNK

COLUMNS = tl.constexpr(7)
"""Of the table of a parameter: the addresses of itself, of codes and scales of both states, its first program, its rows."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(at, TYPE: tl.constexpr):
    """An address that is in memory, as a pointer. Addresses are multiples of 16."""
    return tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _nearest(x, cells, LEAST: tl.constexpr, FIRST: tl.constexpr, LOW: tl.constexpr, ZERO: tl.constexpr):
    """`CodeTables.nearest` of a tile. ZERO is negative for a map without negative numbers. A NaN becomes LEAST."""
    size = tl.maximum(tl.abs(x) if ZERO >= 0 else x, LEAST)
    bits = size.to(tl.int32, bitcast=True)
    code = (bits + tl.reshape(tl.gather(cells, tl.ravel((bits >> LOW) - FIRST), 0), x.shape)) >> LOW
    if ZERO >= 0:
        sign = x.to(tl.int32, bitcast=True) >> 31
        code = tl.maximum((code ^ sign) + (ZERO - sign), 0)
    return code


@triton.jit
def _largest(x):
    """The largest magnitude of each row, NaN above all: bits of positive numbers are ordered as they are."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)


@triton.jit
def _mix(word):
    word = (word ^ ((word >> 16) & 0xFFFF)) * 0x21F0AAAD
    word = (word ^ ((word >> 15) & 0x1FFFF)) * 0x735A2D97
    return word ^ ((word >> 15) & 0x1FFFF)


@triton.jit
def _rounded(x, seed, index):
    """`stochastic_round`, still float32."""
    bits = x.to(tl.int32, bitcast=True)
    up = ((bits + (_mix(_mix(index) ^ seed) & 0xFFFF)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, up, x)


@triton.jit
def _scaled(bits, ONE_OVER: tl.constexpr):
    """The scales of rows, and 1 / scale."""
    scale = bits.to(tl.float32, bitcast=True) * ONE_OVER
    return scale, tl.where(scale < TINY, 0.0, 1.0 / scale)


@triton.jit
def adam_kernel(
    table_ptr, grads_ptr, owner_ptr, hyper_ptr, noise_ptr, values1_ptr, cells1_ptr, values2_ptr, cells2_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
    SIZE: tl.constexpr, TOP1: tl.constexpr, LEAST1: tl.constexpr, FIRST1: tl.constexpr, LOW1: tl.constexpr, ZERO1: tl.constexpr,
    CELLS1: tl.constexpr, TOP2: tl.constexpr, LEAST2: tl.constexpr, FIRST2: tl.constexpr, LOW2: tl.constexpr, ZERO2: tl.constexpr,
    CELLS2: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """TOP: 1 / the largest entry of a map. hyper: as `_Adam.scalars` gives them."""
    pid = tl.program_id(0)
    owner = tl.load(owner_ptr + pid)
    at = table_ptr + owner * COLUMNS
    param_ptr, grad_ptr = _pointer(at, PARAM), _pointer(grads_ptr + owner, GRAD)
    q1_ptr, s1_ptr = _pointer(at + 1, tl.uint8), _pointer(at + 2, tl.float32)
    q2_ptr, s2_ptr = _pointer(at + 3, tl.uint8), _pointer(at + 4, tl.float32)
    start = (pid - tl.load(at + 5)) * ROWS  # int64
    row = tl.arange(0, ROWS)
    there = row < tl.load(at + 6) - start
    first = start * WIDTH

    decay, step_size = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    one_minus_beta1, beta2 = tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3)
    one_minus_beta2, correction = tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    eps = tl.load(hyper_ptr + 6)
    values1, values2 = tl.load(values1_ptr + tl.arange(0, SIZE)), tl.load(values2_ptr + tl.arange(0, SIZE))
    scale1 = tl.load(s1_ptr + start + row, mask=there, other=0.0)[:, None]
    scale2 = tl.load(s2_ptr + start + row, mask=there, other=0.0)[:, None]

    NARROW: tl.constexpr = WIDTH // PLANES
    column = tl.arange(0, NARROW)
    place = (row * NARROW)[:, None] + column[None, :]  # of bytes of codes
    mask = there[:, None] & (column >= 0)[None, :]
    codes = first // PLANES + place
    q1 = tl.load(q1_ptr + codes, mask=mask, other=0).to(tl.int32)
    q2 = tl.load(q2_ptr + codes, mask=mask, other=0).to(tl.int32)

    for plane in tl.static_range(PLANES):
        element = column if PLANES == 1 else column // 16 * 32 + column % 16 + 16 * plane
        inside = (row * WIDTH)[:, None] + element[None, :]
        code1, code2 = q1, q2
        if PLANES > 1:
            code1, code2 = (q1 >> (4 * plane)) & 15, (q2 >> (4 * plane)) & 15
        m = tl.reshape(tl.gather(values1, tl.ravel(code1), 0), q1.shape) * scale1
        v = tl.reshape(tl.gather(values2, tl.ravel(code2), 0), q2.shape) * scale2
        grad = tl.load(grad_ptr + first + inside, mask=mask, other=0.0).to(tl.float32)
        param = tl.load(param_ptr + first + inside, mask=mask, other=0.0).to(tl.float32)
        if MAXIMIZE:
            grad = -grad
        if DECOUPLED:
            param = param * decay
        else:
            grad = grad + decay * param
        m = m + one_minus_beta1 * (grad - m)
        v = v * beta2 + one_minus_beta2 * grad * grad
        # Off by three units in the last place at most, as compiled code is (kernel.py); correctly rounded they take a branch.
        root = tl.rsqrt(v * tl.rsqrt(v + TINY) * correction + eps)
        param = param - step_size * (m * root * root)
        if STOCHASTIC:
            param = _rounded(param, tl.load(noise_ptr + 2 * owner), (first + inside).to(tl.int32))
        tl.store(param_ptr + first + inside, param.to(PARAM), mask=mask)
        if plane == 0:
            m0, v0 = m, v
        else:
            m1, v1 = m, v

    largest1, largest2 = _largest(m0), _largest(v0)
    if PLANES > 1:
        largest1, largest2 = tl.maximum(largest1, _largest(m1)), tl.maximum(largest2, _largest(v1))
    scale1, inverse1 = _scaled(largest1, TOP1)
    scale2, inverse2 = _scaled(largest2, TOP2)
    tl.store(s1_ptr + start + row, scale1, mask=there)
    tl.store(s2_ptr + start + row, scale2, mask=there)
    cells1, cells2 = tl.load(cells1_ptr + tl.arange(0, CELLS1)), tl.load(cells2_ptr + tl.arange(0, CELLS2))
    q1 = _nearest(m0 * inverse1[:, None], cells1, LEAST1, FIRST1, LOW1, ZERO1)
    q2 = _nearest(v0 * inverse2[:, None], cells2, LEAST2, FIRST2, LOW2, ZERO2)
    if PLANES > 1:
        q1 = q1 | (_nearest(m1 * inverse1[:, None], cells1, LEAST1, FIRST1, LOW1, ZERO1) << 4)
        q2 = q2 | (_nearest(v1 * inverse2[:, None], cells2, LEAST2, FIRST2, LOW2, ZERO2) << 4)
    tl.store(q1_ptr + codes, q1.to(tl.uint8), mask=mask)
    tl.store(q2_ptr + codes, q2.to(tl.uint8), mask=mask)


def takes(plan: Plan, part: Large) -> bool:
    """Whether the kernel is for this rule, these formats and where the tensors lie."""
    specs = part.specs
    if plan.update is not adam or dict(plan.options)["amsgrad"] or not all(isinstance(s, Mapped) for s in specs):
        return False
    first, second = specs
    assert isinstance(first, Mapped) and isinstance(second, Mapped)
    width, codes = first.block[-1], 8 // part.planes
    if (
        first.block != second.block
        or width & (width - 1)
        or width % CHUNK
        or width > min(elements for elements, _ in TILES.values())
    ):
        return False
    if not first.bits == second.bits == codes or any(views is None for views in part.views):
        return False
    return all(t.data_ptr() % 16 == 0 for t in part.locals)


TILES = {1: (4096, 4), 2: (1024, 2)}
"""Elements and warps of a program, by planes: the fastest of six on an H200. The tables of 8-bit maps are worth a larger one."""


class AdamLaunch:
    """The launch for the parameters of a part, and what does not change from step to step."""

    def __init__(self, plan: Plan, part: Large, elements: int = 0, warps: int = 0) -> None:
        first, second = part.specs
        assert isinstance(first, Mapped) and isinstance(second, Mapped)
        width, usual = first.block[-1], TILES[part.planes]
        rows, warps = max((elements or usual[0]) // width, 1), warps or usual[1]
        table: list[list[int]] = []
        programs: list[int] = []
        for mine, ((q1, s1), (q2, s2)) in zip(part.locals, part.fields):
            count = mine.numel() // width
            addresses = [t.data_ptr() for t in (mine, q1, s1, q2, s2)]
            table.append([*addresses, sum(programs), count])
            programs.append(-(-count // rows))
        device = part.device
        self.table = torch.tensor(table, dtype=torch.int64).to(device)
        self.owner = torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32), torch.tensor(programs)).to(
            device
        )
        self.grid = (sum(programs),)
        self.tables = [code_tables(spec, device) for spec in (first, second)]
        self.warps = warps
        self.constants: dict[str, Any] = {
            "PARAM": _TYPES[part.dtype], "GRAD": _TYPES[part.grad_dtype], "ROWS": rows, "WIDTH": width, "PLANES": part.planes,
            "SIZE": 2**first.bits, **_constants(first, self.tables[0], 1), **_constants(second, self.tables[1], 2),
            "DECOUPLED": dict(plan.options)["decoupled"], "MAXIMIZE": plan.maximize, "STOCHASTIC": plan.stochastic,
        }  # fmt: skip

    def __call__(self, grads: list[Tensor], hyper: Tensor, noise: Tensor | None) -> None:
        """Step. grads: in the order of the parameters of the part."""
        held = [
            g if g.is_contiguous() and g.data_ptr() % 16 == 0 else g.clone(memory_format=torch.contiguous_format)
            for g in grads
        ]
        addresses = torch.tensor([g.data_ptr() for g in held], dtype=torch.int64).to(hyper.device, non_blocking=True)
        maps = [t for each in self.tables for t in (each.values, each.cells)]
        noise = self.owner if noise is None else noise
        adam_kernel[self.grid](
            self.table, addresses, self.owner, hyper, noise, *maps, **self.constants, num_warps=self.warps
        )


def _copied(grad: Tensor) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


def _constants(spec: Mapped, tables: CodeTables, number: int) -> dict[str, Any]:
    zero = -1 if tables.zero is None else tables.zero
    known = {"TOP": 1 / spec.values[-1], "LEAST": tables.least, "FIRST": tables.first, "LOW": tables.low, "ZERO": zero}
    known["CELLS"] = tables.cells.numel()
    return {f"{name}{number}": value for name, value in known.items()}
