"""`generate(cache_implementation="quantized")` of transformers over tensors of ao.

    model.generate(ids, cache_implementation="quantized", cache_config={"backend": "ao", "nbits": 4})

The backends "quanto", which is transformers' default, and "hqq" are this one too where those libraries are not installed. As
transformers has it, the last `residual_length` tokens stay as they are, the others are quantized in groups of `q_group_size`
numbers (arXiv:2402.02750), and attention reads them dequantized: it saves memory, not time.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, QuantizedCache, QuantizedLayer

from ..dtypes import Intx, QTensor

LIBRARIES = {"ao": "", "quanto": "optimum.quanto", "hqq": "hqq"}
"""A backend -> the library that has it."""


class AoQuantizedLayer(QuantizedLayer):
    """The keys and values of one layer, (B, heads, tokens, head_dim), in integers of `nbits` with a zero point.

    nbits: 1 to 8.
    axis_key, axis_value: -1 lets the tokens of a channel share scales; another one the channels of a token.
    q_group_size: how many share one; the greatest common divisor with the length of the dim.
    residual_length: the tokens that stay as they are.
    """

    def __init__(
        self, nbits: int = 4, axis_key: int = 0, axis_value: int = 0, q_group_size: int = 64, residual_length: int = 128
    ) -> None:
        super().__init__(nbits, axis_key, axis_value, q_group_size, residual_length)
        self.spec(0, (1, 1, q_group_size, q_group_size))

    def spec(self, axis: int, shape: tuple[int, ...]) -> Intx:
        """How a tensor of this shape is quantized."""
        tokens, width = shape[-2:]
        block = (
            (1, 1, math.gcd(self.q_group_size, tokens), 1)
            if axis == -1
            else (1, 1, 1, math.gcd(self.q_group_size, width))
        )
        return Intx(self.nbits, block, signed=False, symmetric=False, zero_point="float")

    def _quantize(self, tensor: Tensor, axis: int) -> QTensor:  # type: ignore[override]
        return self.spec(axis, tuple(tensor.shape)).quantize(tensor)

    def _dequantize(self, q_tensor: QTensor) -> Tensor:
        return q_tensor.dequantize()


def is_ours(backend: str) -> bool:
    """Whether a backend is ours: "ao", and that of a library which is not there."""
    if backend not in LIBRARIES:
        return False
    top, _, rest = LIBRARIES[backend].partition(".")
    found = bool(top) and importlib.util.find_spec(top) is not None
    return not (found and (not rest or importlib.util.find_spec(f"{top}.{rest}") is not None))


_init = QuantizedCache.__init__


@functools.wraps(_init)
def _init_cache(self: Any, backend: str, config: Any, *args: Any, **kwargs: Any) -> None:
    if not is_ours(backend):
        _init(self, backend, config, *args, **kwargs)
        return
    names = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
    given = {name: value for name, value in {**dict(zip(names, args)), **kwargs}.items() if value is not None}
    text = config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise ValueError(f"QuantizedCache takes models whose layers all see all tokens, got layers of {sorted(types)}")
    Cache.__init__(self, layers=[AoQuantizedLayer(**given) for _ in range(text.num_hidden_layers)])


cache_utils.QuantizedCache.__init__ = _init_cache  # type: ignore[method-assign]
