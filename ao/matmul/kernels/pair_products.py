"""PTX that multiplies chunks of packed codes with tokens by the tensor cores, from registers alone.

Lane 4 g + t has a chunk of 32 codes, `bits` words (bits.py), of rows g and g + 8 of 16, and the same 32 elements of token g. One
`mma` takes four codes of either row, as pairs of bfloat16 (bf16_pairs.py), from each of the four lanes t: 16 places of K. Where
a code goes among these is free as long as x follows, and it does: a lane gives four elements of x, two words of 16, alike. It
gets the sums of rows g and g + 8 with tokens 2 t and 2 t + 1.

Tables and small floats of 4 bits are looked up in shared memory, both codes of a byte at once: elements e and e + 16, and so are
the elements of x.
"""

from __future__ import annotations

import functools

from .bf16_pairs import DECLARED, Registers, pairs


def operands(blocks: int) -> str:
    """Of `products_asm`: 4 sums for each block of 8 tokens. Then the same sums before, 8 words of codes of either row, factor and
    term of either half of the chunk of the first row, and of the second, 8 words of a table, and 16 words of x for each block."""
    return ",".join(["=f"] * (4 * blocks) + ["f"] * (4 * blocks) + ["r"] * (32 + 16 * blocks))


def _looked_up(r: Registers, other: str, scaled: bool, g: int) -> str:
    """Codes 2 g, 2 g + 16, 2 g + 1 and 2 g + 17 of a chunk: the pairs a and b. other: the factor of the second half.

    The first word of the table is the address of 256 words, 128 bytes apart, each the numbers of both codes of a byte."""
    lines = [f"prmt.b32 z, {r.factor}, {other}, 0x5410; mov.b32 o, 0x80008000;" if scaled else ""]
    for i, name in enumerate("ab"):
        lines.append(f"prmt.b32 t, {r.words[g // 2]}, 0, 0x444{2 * (g % 2) + i}; mad.lo.u32 t, t, 128, {r.table[0]};")
        lines.append(f"ld.shared.b32 {name}, [t];")
        lines.append(f"fma.rn.bf16x2 {name}, {name}, z, o;" if scaled else "")
    return " ".join(lines)


@functools.cache
def products_asm(
    kind: str, bits: int, exponent: int, signed: bool, shift: int | None, scaled: bool, blocks: int
) -> str:
    """The sums over chunks of 4 lanes, added to those before: see `operands`. kind to scaled: `How`."""
    sums = 4 * blocks
    first = 2 * sums
    table = [f"${first + 24 + i}" for i in range(8)]
    rows = [[f"${first + 8 * row + i}" for i in range(8)] for row in range(2)]
    lines = ["{", DECLARED, f".reg .b32 a0, a1, a2, a3; .reg .f32 c<{sums}>;"]
    lines += [f"mov.f32 c{i}, ${sums + i};" for i in range(sums)]
    for j in range(4):
        for half in range(2):
            g = j + 4 * half  # both halves of a table's word follow each other
            for row, words in enumerate(rows):
                at = first + 16 + 4 * row + 2 * half
                r = Registers(words, f"${at}", f"${at + 1}", table)
                if kind == "lookup":
                    lines.append(_looked_up(r._replace(factor=f"${at - 2 * half}"), f"${at + 2 - 2 * half}", scaled, g))
                else:
                    lines.append(pairs(r, kind, bits, exponent, signed, shift, scaled, g))
                lines.append(f"mov.b32 a{row}, a; mov.b32 a{row + 2}, b;")
            for block in range(blocks):
                x = first + 32 + 16 * block + 2 * g
                c = "{" + ", ".join(f"c{4 * block + i}" for i in range(4)) + "}"
                lines.append("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
                lines.append(f"{c}, {{a0, a1, a2, a3}}, {{${x}, ${x + 1}}}, {c};")
    lines += [f"mov.f32 ${i}, c{i};" for i in range(sums)]
    return " ".join([*lines, "}"])
