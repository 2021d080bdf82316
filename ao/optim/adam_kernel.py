"""One launch of a Triton kernel for the step of Adam of all parameters whose states are codes into maps, on an NVIDIA GPU.

The parameters of a model lie where they lie; a table of addresses says where, and another one which of them a program works on.
So the host prepares a list of gradients and launches once, however many parameters there are.

A program takes tiles of rows of one parameter, one after the other. Before the first it puts the tables of the maps
(code_tables.py) in shared memory, where inline PTX finds them: Triton's own look-up would write its table anew each time, and
wait for all threads twice. Of a tile it looks the states up, computes the rule of adam.py in float32 in the same order, finds the
largest number of each row and writes the codes next to the new states. 4-bit codes are read and written by planes, as in rows.py.
Warps of a tile that have rows of their own never wait for each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ao.dtypes import Mapped, Spec

from .adam import adam
from .code_tables import CodeTables, code_tables
from .kernel import Plan
from .parts import Large
from .rows import CHUNK

COLUMNS = tl.constexpr(7)
"""Of the table of a parameter: the addresses of itself, of codes and scales of both states, its first program, its rows."""

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

SHARED = {1: 8448, 2: 1024}
"""Words of shared memory for the tables of both maps, by planes. There may be 12,288: more has to be asked for."""


def _lookup_asm(bits: int, plane: int) -> str:
    """Four numbers from the codes in a word. Operands: the word, where the number of code 0 is."""
    made = []
    for i in range(4):
        code = f"prmt.b32 t{i}, $4, 0, {0x4440 + i:#x};" if bits == 8 else f"bfe.u32 t{i}, $4, {8 * i + 4 * plane}, 4;"
        made.append(f"{code} mad.lo.u32 t{i}, t{i}, 4, $5; ld.shared.f32 ${i}, [t{i}];")
    return "{ .reg .b32 t<4>; " + " ".join(made) + " }"


def _nearest_asm(plane: int) -> str:
    """The codes of four numbers as a word, from their bits. Operands: those, where cell 0 is, `low`, 2**(24 - low); in the second
    plane the word of the first, too."""
    made = [
        f"shr.u32 t{i}, ${1 + i}, $9; mad.lo.u32 t{i}, t{i}, 4, $5; ld.shared.b32 t{i}, [t{i}];"
        f" mad.lo.u32 t{i}, ${1 + i}, $13, t{i};"
        for i in range(4)
    ]
    last = (
        "prmt.b32 $0, t0, t2, 0x5410;"
        if plane == 0
        else "prmt.b32 t0, t0, t2, 0x5410; shl.b32 t0, t0, 4; or.b32 $0, t0, $17;"
    )
    return "{ .reg .b32 t<4>; " + " ".join(made) + f" prmt.b32 t0, t0, t1, 0x73; prmt.b32 t2, t2, t3, 0x73; {last} }}"


_PLACE_ASM = tl.constexpr(
    tuple(
        f"{{ .reg .b64 a; .shared .align 128 .b32 ao_tables[{words}]; mov.u64 a, ao_tables; cvt.u32.u64 $0, a; }}"
        for words in SHARED.values()
    )
)
_LOOKUP_ASM = tl.constexpr((_lookup_asm(8, 0), _lookup_asm(4, 0), _lookup_asm(4, 1)))
_NEAREST_ASM = tl.constexpr((_nearest_asm(0), _nearest_asm(1)))


@triton.jit
def _pointer(at, TYPE: tl.constexpr):
    """An address that is in memory, as a pointer. Addresses are multiples of 16."""
    return tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _filled(image_ptr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Puts the tables in shared memory; where they begin."""
    place = tl.inline_asm_elementwise(_PLACE_ASM[PLANES - 1], "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    BLOCK: tl.constexpr = 1024
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        there = (word < WORDS).to(tl.int32)
        entry = tl.load(image_ptr + word, mask=word < WORDS, other=0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }", "=r,r,r,r",
            [place + 4 * word, entry, there], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    # After the barrier, so that what depends on it is, too.
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _numbers(codes, values, PLANES: tl.constexpr, plane: tl.constexpr):
    """The numbers of the codes of a plane. codes: bytes. values: where the table is in shared memory."""
    return tl.inline_asm_elementwise(
        _LOOKUP_ASM[PLANES - 1 + plane], "=&f,=&f,=&f,=&f,r,r,r,r,r", [codes, values],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _bits(x, LEAST: tl.constexpr, MIRROR: tl.constexpr):
    """What `CodeTables.nearest` looks up. A NaN becomes LEAST."""
    bits = tl.maximum(tl.abs(x) if MIRROR else x, LEAST).to(tl.int32, bitcast=True)
    if MIRROR:
        bits = bits ^ ((x.to(tl.int32, bitcast=True) >> 31) & MIRROR)
    return bits


@triton.jit
def _nearest(bits, cells, FIRST: tl.constexpr, LOW: tl.constexpr):
    """`CodeTables.nearest` of a tile, as bytes. cells: where they are in shared memory."""
    return tl.inline_asm_elementwise(
        _NEAREST_ASM[0], "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [bits, cells - 4 * FIRST, LOW, 1 << (24 - LOW)],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _nearest_above(bits, cells, FIRST: tl.constexpr, LOW: tl.constexpr, below):
    """The same for the upper halves of bytes whose lower ones are there."""
    return tl.inline_asm_elementwise(
        _NEAREST_ASM[1], "=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [bits, cells - 4 * FIRST, LOW, 1 << (24 - LOW), below],
        dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _largest(x):
    """The bits of the largest number of each row, NaN above all: those of positive numbers are ordered as they are."""
    return tl.max(x.to(tl.int32, bitcast=True), 1)


@triton.jit
def _wide(x):
    """A tile as float32."""
    if x.dtype == tl.bfloat16:  # in place, two of a word
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _store_scale(at, scale, there):
    """`tl.store` by all lanes of a row, which have the scale: Triton's would bring it to one lane by way of shared memory."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.f32 [$1], $2; mov.b32 $0, 0; }", "=r,l,f,r",
        [at.to(tl.int64), scale, there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
def _reciprocal(x):
    """1 / x, off by one unit in the last place at most."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _scaled(bits, ONE_OVER: tl.constexpr):
    """The scales of rows, and 1 / scale."""
    scale = bits.to(tl.float32, bitcast=True) * ONE_OVER
    return scale, tl.where(scale < TINY, 0.0, _reciprocal(scale))


@triton.jit(do_not_specialize=["tiles"])
def adam_kernel(
    table_ptr, grads_ptr, owner_ptr, hyper_ptr, noise_ptr, image_ptr, tiles,
    PARAM: tl.constexpr, GRAD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
    WORDS: tl.constexpr, TOP1: tl.constexpr, LEAST1: tl.constexpr, FIRST1: tl.constexpr, LOW1: tl.constexpr,
    MIRROR1: tl.constexpr, VALUES1: tl.constexpr, CELLS1: tl.constexpr, TOP2: tl.constexpr,
    LEAST2: tl.constexpr, FIRST2: tl.constexpr, LOW2: tl.constexpr, MIRROR2: tl.constexpr, VALUES2: tl.constexpr,
    CELLS2: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """tiles: of ROWS rows, which a program takes one after the other. TOP: 1 / the largest entry of a map. VALUES, CELLS: where
    the tables of a map are, in words. hyper: as `_Adam.scalars` gives them."""
    pid = tl.program_id(0)
    owner = tl.load(owner_ptr + pid)
    at = table_ptr + owner * COLUMNS
    param_ptr, grad_ptr = _pointer(at, PARAM), _pointer(grads_ptr + owner, GRAD)
    q1_ptr, s1_ptr = _pointer(at + 1, tl.uint8), _pointer(at + 2, tl.float32)
    q2_ptr, s2_ptr = _pointer(at + 3, tl.uint8), _pointer(at + 4, tl.float32)
    start = (pid - tl.load(at + 5)) * tiles * ROWS  # int64
    left = tl.minimum(tl.load(at + 6) - start, tiles * ROWS).to(tl.int32)
    param_ptr, grad_ptr = param_ptr + start * WIDTH, grad_ptr + start * WIDTH
    q1_ptr, q2_ptr = q1_ptr + start * (WIDTH // PLANES), q2_ptr + start * (WIDTH // PLANES)
    s1_ptr, s2_ptr = s1_ptr + start, s2_ptr + start

    decay, step_size = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    one_minus_beta1, beta2 = tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3)
    one_minus_beta2, correction = tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5)
    eps = tl.load(hyper_ptr + 6)
    tables = _filled(image_ptr, WORDS, PLANES)
    values1, values2 = tables + 4 * VALUES1, tables + 4 * VALUES2
    cells1, cells2 = tables + 4 * CELLS1, tables + 4 * CELLS2

    NARROW: tl.constexpr = WIDTH // PLANES
    column = tl.arange(0, NARROW)[None, :]
    for done in range(0, left, ROWS):
        row = done + tl.arange(0, ROWS)
        there = (row < left)[:, None]
        near = tl.minimum(row, left - 1)  # so that loads need no mask
        codes = near[:, None] * NARROW + column
        q1, q2 = tl.load(q1_ptr + codes), tl.load(q2_ptr + codes)
        scale1, scale2 = tl.load(s1_ptr + near)[:, None], tl.load(s2_ptr + near)[:, None]
        for plane in tl.static_range(PLANES):
            element = column if PLANES == 1 else column // 16 * 32 + column % 16 + 16 * plane
            element += near[:, None] * WIDTH
            grad, param = _wide(tl.load(grad_ptr + element)), _wide(tl.load(param_ptr + element))
            m = _numbers(q1, values1, PLANES, plane) * scale1
            v = _numbers(q2, values2, PLANES, plane) * scale2
            if MAXIMIZE:
                grad = -grad
            if DECOUPLED:
                param = param * decay
            else:
                grad = grad + decay * param
            m = m + one_minus_beta1 * (grad - m)
            v = v * beta2 + one_minus_beta2 * grad * grad
            # Off by three units in the last place at most, as compiled code is (kernel.py); correctly rounded they take a branch.
            # TINY: a root of less would be taken for 0.
            param = param - step_size * (m * _reciprocal(tl.sqrt(v + TINY) * correction + eps))
            if STOCHASTIC:
                param = _rounded(param, tl.load(noise_ptr + 2 * owner), (start * WIDTH).to(tl.int32) + element)
            tl.store(param_ptr + element, param.to(PARAM), mask=there)
            if plane == 0:
                m0, v0 = m, v
            else:
                m1, v1 = m, v

        largest1, largest2 = _largest(tl.abs(m0)), _largest(v0)
        if PLANES > 1:
            largest1, largest2 = tl.maximum(largest1, _largest(tl.abs(m1))), tl.maximum(largest2, _largest(v1))
        scale1, inverse1 = _scaled(largest1, TOP1)
        scale2, inverse2 = _scaled(largest2, TOP2)
        _store_scale(s1_ptr + row, scale1, row < left)
        _store_scale(s2_ptr + row, scale2, row < left)
        q1 = _nearest(_bits(m0 * inverse1[:, None], LEAST1, MIRROR1), cells1, FIRST1, LOW1)
        q2 = _nearest(_bits(v0 * inverse2[:, None], LEAST2, MIRROR2), cells2, FIRST2, LOW2)
        if PLANES > 1:
            q1 = _nearest_above(_bits(m1 * inverse1[:, None], LEAST1, MIRROR1), cells1, FIRST1, LOW1, q1)
            q2 = _nearest_above(_bits(v1 * inverse2[:, None], LEAST2, MIRROR2), cells2, FIRST2, LOW2, q2)
        tl.store(q1_ptr + codes, q1, mask=there)
        tl.store(q2_ptr + codes, q2, mask=there)


def takes(plan: Plan, part: Large) -> bool:
    """Whether the kernel is for this rule, these formats and where the tensors lie."""
    specs = part.specs
    if plan.update is not adam or dict(plan.options)["amsgrad"] or not all(isinstance(s, Mapped) for s in specs):
        return False
    first, second = specs
    assert isinstance(first, Mapped) and isinstance(second, Mapped)
    width, codes = first.block[-1], 8 // part.planes
    if first.block != second.block or width & (width - 1) or width % CHUNK or width > TILES[part.planes][0]:
        return False
    if not first.bits == second.bits == codes or any(views is None for views in part.views):
        return False
    if sum(map(len, _tables(specs, part.device))) > SHARED[part.planes]:
        return False
    return all(t.data_ptr() % 16 == 0 for t in part.locals)


TILES = {1: (2048, 8), 2: (2048, 4)}
"""Elements and warps of a tile, by planes."""

REGISTERS = 56
"""Of a thread, at most, for parameters of 16 bits: as fast as 64 or faster on an H200, and 48 are slower."""


def _tables(specs: Sequence[Spec | None], device: torch.device) -> list[Tensor]:
    """What is in shared memory: the numbers and the cells of the first map, and those of the second. int32."""
    made = []
    for spec in specs:
        assert isinstance(spec, Mapped)
        tables = code_tables(spec, device)
        made += [tables.values.view(torch.int32), tables.cells]
    return made


class AdamLaunch:
    """The launch for the parameters of a part, and what does not change from step to step."""

    def __init__(self, plan: Plan, part: Large) -> None:
        first, second = part.specs
        assert isinstance(first, Mapped) and isinstance(second, Mapped)
        width, planes, device = first.block[-1], part.planes, part.device
        elements, warps = TILES[planes]
        rows = elements // width
        counts = [mine.numel() // width for mine in part.locals]
        self.tiles = _tiles(sum(-(-count // rows) for count in counts), device)
        table: list[list[int]] = []
        programs: list[int] = []
        for mine, count, ((q1, s1), (q2, s2)) in zip(part.locals, counts, part.fields):
            addresses = [t.data_ptr() for t in (mine, q1, s1, q2, s2)]
            table.append([*addresses, sum(programs), count])
            programs.append(-(-count // (rows * self.tiles)))
        self.table = torch.tensor(table, dtype=torch.int64, device="cpu").to(device)
        self.owner = torch.repeat_interleave(
            torch.arange(len(programs), dtype=torch.int32, device="cpu"),
            torch.tensor(programs, dtype=torch.int64, device="cpu"),
        ).to(device)
        self.grid = (sum(programs),)
        tables = _tables(part.specs, device)
        self.image = torch.cat(tables)
        places = [0, *itertools.accumulate(map(len, tables))]
        short = part.dtype.itemsize == part.grad_dtype.itemsize == 2
        self.options: dict[str, Any] = {"num_warps": warps, **({"maxnreg": REGISTERS} if short else {})}
        self.constants: dict[str, Any] = {
            "PARAM": _TYPES[part.dtype], "GRAD": _TYPES[part.grad_dtype], "ROWS": rows, "WIDTH": width, "PLANES": planes,
            "WORDS": places[-1], "VALUES1": places[0], "CELLS1": places[1], "VALUES2": places[2], "CELLS2": places[3],
            **_constants(first, code_tables(first, device), 1), **_constants(second, code_tables(second, device), 2),
            "DECOUPLED": dict(plan.options)["decoupled"], "MAXIMIZE": plan.maximize, "STOCHASTIC": plan.stochastic,
        }  # fmt: skip

    def __call__(self, grads: list[Tensor], hyper: Tensor, noise: Tensor | None) -> None:
        """Step. grads: in the order of the parameters of the part."""
        held = [
            g if g.is_contiguous() and g.data_ptr() % 16 == 0 else g.clone(memory_format=torch.contiguous_format)
            for g in grads
        ]
        addresses = torch.tensor([g.data_ptr() for g in held], dtype=torch.int64, device="cpu").to(
            hyper.device, non_blocking=True
        )
        noise = self.owner if noise is None else noise
        adam_kernel[self.grid](
            self.table, addresses, self.owner, hyper, noise, self.image, self.tiles, **self.constants, **self.options
        )


def _tiles(total: int, device: torch.device) -> int:
    """How many tiles a program takes: each fills its tables first, which takes as long as a few tiles do."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(total // (4 * processors), max(8, total // (16 * processors))))


def _constants(spec: Mapped, tables: CodeTables, number: int) -> dict[str, Any]:
    known = {
        "TOP": 1 / spec.values[-1],
        "LEAST": tables.least,
        "FIRST": tables.first,
        "LOW": tables.low,
        "MIRROR": tables.mirror,
    }
    return {f"{name}{number}": value for name, value in known.items()}
