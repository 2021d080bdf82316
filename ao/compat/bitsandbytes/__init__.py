"""The names of bitsandbytes over ao: in place of `bitsandbytes`, write `ao.compat.bitsandbytes`.

    import ao.compat.bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(512, 512, quant_type="nf4").to("cuda")
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-4)

names.py says of each name what it is here.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear as _linear

from ...dtypes import QTensor
from . import functional, nn, optim
from .nn.modules import MatmulLtState, int8_product
from .state import QuantState

__version__ = "0.50.2"
"""The version whose names these are."""


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """A @ B.T + bias with int8 rows of both (LLM.int8()).

    A: (..., K). B: (N, K), in floating point or the weight of a `Linear8bitLt`.
    threshold: columns of A in which a magnitude reaches it are multiplied in floating point; also `state.threshold`.
    """
    made = int8_product(A, B, bias, threshold or (0.0 if state is None else state.threshold))
    return made if out is None else out.copy_(made)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState | None = None, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A @ W.T + bias, with W the 4-bit weight (N, K).

    A: (..., K). B: the weight of a `Linear4bit`, or codes, also transposed, and `quant_state`.
    Raises ValueError for codes without a state.
    """
    if isinstance(B, QTensor):
        weight: Tensor = B
    else:
        if quant_state is None:
            raise ValueError("matmul_4bit: give quant_state with codes; functional.quantize_4bit returns both")
        weight = functional.dequantize_4bit(B, quant_state).to(A.dtype)
    made = _linear(A, weight, bias)
    return made if out is None else out.copy_(made)


__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "nn", "optim"]
