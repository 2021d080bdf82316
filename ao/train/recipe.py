"""`Recipe`: how a linear layer trains, as three matrix products with a Spec per operand.

With x (M, K), w (N, K) and g = d loss / d out (M, N), a linear layer computes

    out         = x @ w.T       the sum runs over K
    grad_input  = g @ w         over N
    grad_weight = g.T @ x       over M

Written as a @ b.T, the sum runs along the rows of both operands: (x, w), (g, w.T) and (g.T, x.T). A Spec of block (1, -1)
thus always means one scale per row of the product, and (-1, -1) one for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ao.dtypes import Float8, FloatX, Intx, Spec

_BLOCKS: dict[tuple[int, ...], str] = {(-1, -1): "tensor", (1, -1): "row"}


@dataclass(frozen=True)
class Gemm:
    """One product a @ b.T.

    a, b: how to quantize each operand along its rows; None leaves it in floating point.
    fast_accum: let float8 tensor cores keep fewer bits of the running sum.
    hadamard: turn both operands by a Hadamard matrix of so many points along the sum before they are rounded (hadamard.py),
        which leaves the product what it is and spreads large numbers; 0 does not. For grad_weight.
    """

    a: Spec | None = None
    b: Spec | None = None
    fast_accum: bool = False
    hadamard: int = 0

    @property
    def multiple(self) -> int:
        """What the length of the sum has to be a multiple of."""
        blocks = (spec.block[-1] for spec in (self.a, self.b) if spec is not None)
        return math.lcm(self.hadamard or 1, *(b for b in blocks if b > 1))

    @property
    def is_float8(self) -> bool:
        """Whether the product is one of float8 numbers."""
        return isinstance(self.a, Float8) and isinstance(self.b, Float8)


@dataclass(frozen=True)
class Recipe:
    """The three products of a linear layer.

    output: (x, w). grad_input: (g, w.T). grad_weight: (g.T, x.T).
    gather: quantize the weight by this Spec before FSDP2 gathers it, or None.
    emulate: multiply the quantized numbers in floating point, also on a chip that has float8.
    pad: fill up dims of a float8 product with zeros to the multiples of 16 that the chip wants, and tokens to the blocks of
        grad_weight.
    """

    output: Gemm = field(default_factory=Gemm)
    grad_input: Gemm = field(default_factory=Gemm)
    grad_weight: Gemm = field(default_factory=Gemm)
    gather: Spec | None = None
    emulate: bool = False
    pad: bool = False

    @property
    def uses_float8(self) -> bool:
        """Whether any product is one of float8 numbers."""
        return any(gemm.is_float8 for gemm in (self.output, self.grad_input, self.grad_weight))

    def __str__(self) -> str:
        def name(spec: Spec | None) -> str:
            if spec is None:
                return "-"
            kind = str(spec)
            if isinstance(spec, Float8):
                kind = spec.format
            elif isinstance(spec, Intx):
                kind = f"int{spec.bits}"
            elif isinstance(spec, FloatX):
                kind = f"e{spec.exponent}m{spec.mantissa}"
            size = spec.block
            return f"{kind}/{_BLOCKS.get(size, 'x'.join(map(str, size)))}"

        gemms = (("out", self.output), ("grad_input", self.grad_input), ("grad_weight", self.grad_weight))
        return ", ".join(f"{each}={name(gemm.a)} @ {name(gemm.b)}" for each, gemm in gemms)
