"""torchao.quantization.linear_activation_quantized_tensor: a weight that quantizes the activation it meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ao import QTensor

from ..kinds import Kind
from ..utils import TorchAOBaseTensor

__all__ = ["LinearActivationQuantizedTensor", "to_linear_activation_quantized"]


class ActivationQuantized(TorchAOBaseTensor):
    """A weight, and a function that quantizes the activation: `F.linear(input_quant_func(x), weight)`."""

    tensor_data_names = ["original_weight_tensor"]
    tensor_attribute_names = ["input_quant_func", "quant_kwargs"]

    original_weight_tensor: Tensor
    input_quant_func: Callable[..., Tensor]
    quant_kwargs: Mapping[str, Any]

    @staticmethod
    def __new__(cls, original_weight_tensor: Tensor, input_quant_func: Any, quant_kwargs: Any) -> Any:
        t = original_weight_tensor
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device, requires_grad=False)

    def __init__(self, original_weight_tensor: Tensor, input_quant_func: Any, quant_kwargs: Any) -> None:
        self.original_weight_tensor, self.input_quant_func = original_weight_tensor, input_quant_func
        self.quant_kwargs = quant_kwargs

    def dequantize(self, *args: Any) -> Tensor:
        """The weight as numbers."""
        return self.original_weight_tensor.dequantize()


@ActivationQuantized.implements_torch_function([F.linear])
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    input, weight, bias = (*args, kwargs.get("bias"))[:3]
    x = weight.input_quant_func(input, **weight.quant_kwargs)
    return F.linear(x, weight.original_weight_tensor, bias).to(input.dtype)


class LinearActivationQuantizedTensor(metaclass=Kind):
    """A QTensor whose Spec quantizes activations, or what `from_float` makes."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, ActivationQuantized) or (isinstance(x, QTensor) and x.spec.act is not None)

    @staticmethod
    def from_float(
        input_float: Tensor, input_quant_func: Callable[..., Tensor], quant_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """A quantized weight that quantizes the activation it meets by a function.

        The Spec of what the function gives, where it gives a QTensor with qparams of its own for each token, becomes the
        weight's `act`, so that it has the kernels of `ao`.
        """
        if isinstance(input_float, QTensor) and not quant_kwargs:
            act = _act_of(input_quant_func, input_float)
            if act is not None:
                spec = replace(input_float.spec, act=act)
                return spec.wrap(input_float.fields(), input_float.dtype, input_float.shape)
        return ActivationQuantized(input_float, input_quant_func, dict(quant_kwargs or {}))


def _act_of(function: Callable[..., Tensor], weight: QTensor) -> Any:
    """The Spec of what a function makes of an activation, if it is one that depends on the activation alone."""
    try:
        small = torch.randn(2, weight.shape[-1], dtype=weight.dtype, device=weight.device)
        made, other = function(small), function(small * 2)
    except Exception:
        return None
    if not isinstance(made, QTensor) or not isinstance(other, QTensor) or made.spec.act is not None:
        return None
    dynamic = not torch.equal(getattr(made, "scale", made), getattr(other, "scale", other))
    usual = made.spec.quantize(small)
    same = all(torch.equal(t, usual.fields()[name]) for name, t in made.fields().items())
    return made.spec if dynamic and same and made.spec.block in ((1, -1), (-1, -1)) else None


to_linear_activation_quantized = LinearActivationQuantizedTensor.from_float
