"""PTX that turns packed codes into pairs of float16 and multiplies them with x by the tensor cores, for one token.

A lane has a chunk of 32 codes, `bits` words (bits.py), of each of two rows. One `mma` takes four codes of either row from each
of the four lanes that share these rows: 16 places of K. Columns of x keep the chunks of these lanes apart: a column has x of one
lane and zeros at the places of the others, so that its sums are those of one chunk. Of the eight columns, a lane gets back two:
in one stands x of the first part of its chunk, in the other that of the second. Lanes whose chunks have the same scale need not
be kept apart, and where two or four are together, x of as many slices of K has room in the eight columns (`places`): those of
other slices than that of the codes have sums that nobody wants.

    minifloat  codes become bytes, the sign above, that are the high byte of float16 (two bits of mantissa or fewer), or a
               float8 e4m3 (three), which is converted
    table      both codes of a byte are looked up in shared memory at once; other widths one by one
"""

from __future__ import annotations

import functools

from ...dtypes.bits import _SECTIONS

WORDS, X, TABLE = 8, 24, 32
"""The first operands of each kind that `products_asm` takes. The results: the sums of the first part of the chunks, of the first
row with both columns and of the second, and likewise of the second part. 8 words of either row, of which the first `bits` count;
8 words of x; where the table of this lane begins."""

OPERANDS = ",".join(["=f"] * WORDS + ["r"] * (TABLE + 1 - WORDS))

LOOKED_UP = ("pairs", "halves", "table")
"""The ways by a table."""


def way_of(kind: str, bits: int, exponent: int, halves: bool, float8: bool) -> str:
    """How codes become float16: "bytes", "float8", "table", or, from a table of both codes of a byte, "pairs" and "halves".

    halves: whether the parts of a chunk must be its halves. float8: whether the chip converts e4m3."""
    mantissa = bits - 1 - exponent
    if kind in ("minifloat", "float") and mantissa <= 2:
        return "bytes"
    if kind in ("minifloat", "float") and mantissa == 3 and float8:
        return "float8"
    if bits == 4:
        return "halves" if halves else "pairs"
    return "table"


def power_of(how: str, exponent: int) -> int:
    """By 2**-this, numbers of a float with so many bits of exponent are too small as float16."""
    bias = 2 ** (exponent - 1) - 1
    return {"bytes": 15 - bias, "float8": 7 - bias}.get(how, 0)


def elements(how: str, part: int, step: int) -> tuple[int, int, int, int]:
    """Which codes of a chunk step 0 to 3 of either part takes, in the order of the places of K: two, and two 8 places on."""
    if how == "pairs":
        first = 8 * part + 2 * step
        return first, first + 16, first + 1, first + 17
    first = 16 * part + 4 * step
    return first, first + 1, first + 2, first + 3


def places(together: int, column: int) -> tuple[int, int, range]:
    """What a column has of x: of which slice of as many as lanes are together, which part of chunks, and of which lanes.

    A slice is what four lanes have. The sums of a column go back to lane `column // 2`."""
    lane, second = divmod(column, 2)
    of = range(lane // together * together, (lane // together + 1) * together)
    return {1: (0, second, of), 2: (second, lane % 2, of), 4: (lane, second, of)}[together]


class _Lines(list[str]):
    """Lines of PTX, in which a word is shifted by as much once."""

    def __init__(self) -> None:
        super().__init__()
        self.shifted: dict[tuple[int, int], str] = {}

    def right(self, word: int, shift: int) -> str:
        """The name of an operand that is shifted so far to the right, or to the left."""
        if not shift:
            return f"${word}"
        name = self.shifted.get((word, shift))
        if name is None:
            name = self.shifted[word, shift] = f"w{len(self.shifted)}"
            self.append(f".reg .b32 {name}; {'shr' if shift > 0 else 'shl'}.b32 {name}, ${word}, {abs(shift)};")
        return name


def _bytes(lines: _Lines, bits: int, g: int, first: int, up: int, sign: bool) -> str:
    """Codes 4 g to 4 g + 3 times 2**up, a byte each; the name of the word.

    sign: the highest bit of a code goes to that of the byte. first: the operand that is the first word."""
    if bits == 8:
        return f"${first + g}"
    empty, base, low = True, 0, 0
    for section in _SECTIONS[bits]:
        word, shift = first + base + g % section, g // section * section - low
        ones = (2**section - 1) << low
        top = sign and low + section == bits
        moves = [(shift - up, (ones - (1 << bits - 1) if top else ones) << up)]
        if top:
            moves.append((shift + bits - 8, 128))
        for right, mask in moves:
            if mask:
                source, ones4 = lines.right(word, right), f"{mask * 0x01010101:#010x}"
                lines.append(f"and.b32 c, {source}, {ones4};" if empty else f"lop3.b32 c, {source}, {ones4}, c, 0xEA;")
                empty = False
        base += section
        low += section
    return "c"


def _pairs(lines: _Lines, how: str, bits: int, exponent: int, step: int, row: int) -> None:
    """A step of a row: of its first part to a{row} and a{row + 2}, of the other to b{row} and b{row + 2}."""
    first = WORDS + 8 * row
    if how == "halves":
        for i in range(4):
            lines.append(_looked_up(f"${first + step}", i, f"v{i}"))
        for name, order in (("a", "0x5410"), ("b", "0x7632")):
            lines.append(f"prmt.b32 {name}{row}, v0, v1, {order}; prmt.b32 {name}{row + 2}, v2, v3, {order};")
        return
    for part, name in enumerate("ab"):
        g, to = 4 * part + step, (f"{name}{row}", f"{name}{row + 2}")
        if how == "pairs":
            lines += [_looked_up(f"${first + g // 2}", 2 * (g % 2) + i, each) for i, each in enumerate(to)]
            continue
        up = max(0, 3 + exponent - bits) if how == "bytes" else 0
        c = _bytes(lines, bits, g, first, up, sign=how != "table")
        if how == "table":
            lines += [_looked_up(c, i, f"v{i}") for i in range(4)]
            lines.append(f"prmt.b32 {to[0]}, v0, v1, 0x5410; prmt.b32 {to[1]}, v2, v3, 0x5410;")
        elif how == "bytes":
            lines.append(f"prmt.b32 {to[0]}, {c}, 0, 0x1404; prmt.b32 {to[1]}, {c}, 0, 0x3424;")
        else:
            lines.append(f"mov.b32 {{h, l}}, {c}; cvt.rn.f16x2.e4m3x2 {to[0]}, h; cvt.rn.f16x2.e4m3x2 {to[1]}, l;")


def _looked_up(word: str, byte: int, to: str) -> str:
    """An entry is a word, and at every 128 bytes: a copy for each bank."""
    return f"prmt.b32 i, {word}, 0, 0x444{byte}; mad.lo.u32 i, i, 128, ${TABLE}; ld.shared.b32 {to}, [i];"


@functools.cache
def products_asm(how: str, bits: int, exponent: int) -> str:
    """A chunk of two rows times x; how: of `way_of`."""
    lines = _Lines()
    lines.append("{ .reg .b32 a0, a1, a2, a3, b0, b1, b2, b3, c, i, v0, v1, v2, v3; .reg .b16 h, l;")
    lines.append(".reg .f32 p0, p1, p2, p3, q0, q1, q2, q3, f; mov.f32 f, 0f00000000;")
    for step in range(4):
        for row in range(2):
            _pairs(lines, how, bits, exponent, step, row)
        x = f"{{${X + 2 * step}, ${X + 2 * step + 1}}}"
        for name, sums in (("a", "p"), ("b", "q")):
            to = ", ".join(f"{sums}{i}" for i in range(4))
            codes = ", ".join(f"{name}{i}" for i in range(4))
            lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{to}}}, {{{codes}}}, {x}, ")
            lines.append(f"{{{to if step else 'f, f, f, f'}}};")
    lines += [f"mov.f32 ${i + 4 * part}, {name}{i};" for part, name in enumerate("pq") for i in range(4)]
    lines.append("}")
    return " ".join(lines)
