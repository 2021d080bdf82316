"""PTX that reads numbers 0, 1 and 2, five in a byte (`pack_trits`), from the four bytes of a word at once.

A byte is ceil(v * 256 / 243), with v its five digits of base 3. So the integer part of byte * 3**(i + 1) / 256 is V[i], the
number that the first i + 1 digits make, 0 to 242. Two bytes of a word are multiplied at once, in 16 bits each, of which V[i] is
the high byte; one `prmt` brings the four together.

Digit i is V[i] - 3 V[i - 1]. For one token no digit is needed: the sum of x[i] times digits is the sum of y[i] V[i], where
y[i] = x[i] - 3 x[i + 1] is made once for all rows.
"""

from __future__ import annotations

_HALVES = "prmt.b32 e, {word}, 0, 0x4240; prmt.b32 o, {word}, 0, 0x4341;"
"""The even and the odd bytes, in 16 bits each."""


def _leading(i: int) -> str:
    """V[i] of all four bytes."""
    three = 3 ** (i + 1)
    return f"mul.lo.u32 f, e, {three}; mul.lo.u32 g, o, {three}; prmt.b32 v, f, g, 0x7351;"


def times_word(codes: bool) -> str:
    """A word of the weight times y, added to a sum, of integers for `codes`, else of floats.

    Operands: the word, 5 words with the high bytes of y and 5 with the low ones, where the sum of the word begins, its step, and
    the sum. That of floats begins at 0x4B400000, the bits of 12582912, so that its own bits are a float, too.
    """
    lines = ["{ .reg .b32 e, o, f, g, v, a, b; .reg .f32 r; mov.b32 a, 0; mov.b32 b, $12;", _HALVES.format(word="$1")]
    for i in range(5):
        lines.append(f"{_leading(i)} dp4a.u32.s32 a, v, ${2 + i}, a; dp4a.u32.s32 b, v, ${7 + i}, b;")
    lines.append("shl.b32 a, a, 8; add.s32 a, a, b;")
    if codes:
        lines.append("add.s32 $0, a, $14; }")
    else:
        lines.append("mov.b32 r, a; add.f32 r, r, 0fCB400000; fma.rn.f32 $0, r, $13, $14; }")
    return " ".join(lines)


def digits() -> str:
    """The word after five results -> those: the digits of each place, as bytes. V[i] - 3 V[i - 1] carries nowhere."""
    lines = ["{ .reg .b32 e, o, f, g, u, v; mov.b32 u, 0;", _HALVES.format(word="$5")]
    lines += [f"{_leading(i)} mad.lo.u32 ${i}, u, -3, v; mov.b32 u, v;" for i in range(5)]
    return " ".join([*lines, "}"])


def pairs(kind: str) -> str:
    """The word after four results, of four digits -> those: each less 1, as "bf16" or "f16".

    The digit goes to the last bits of the mantissa of 128, or 1024; then one more than that is taken off.
    """
    high, less, one = {
        "bf16": ("0x43434343", "0xC301C301", "0x3F803F80"),
        "f16": ("0x64646464", "0xE401E401", "0x3C003C00"),
    }[kind]
    lines = [f"{{ .reg .b32 a, b, l, o; mov.b32 l, {less}; mov.b32 o, {one};"]
    for name, places in (("a", "0x4140"), ("b", "0x4342")):
        lines.append(f"prmt.b32 {name}, $4, {high}, {places}; fma.rn.{kind}x2 {name}, {name}, o, l;")
    return " ".join([*lines, "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"])
