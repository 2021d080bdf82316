"""torchao.quantization.linear_activation_weight_observed_tensor: a weight that has observers see it, and what it multiplies."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils import TorchAOBaseTensor

__all__ = ["LinearActivationWeightObservedTensor"]


class LinearActivationWeightObservedTensor(TorchAOBaseTensor):
    """A plain weight, with an observer of the input and one of the weight, or None."""

    tensor_data_names = ["original_weight_tensor"]
    tensor_attribute_names = ["input_observer", "weight_observer"]

    original_weight_tensor: Tensor
    input_observer: nn.Module | None
    weight_observer: nn.Module | None

    @staticmethod
    def __new__(cls, original_weight_tensor: Tensor, input_observer: Any, weight_observer: Any) -> Any:
        t = original_weight_tensor
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device, requires_grad=False)

    def __init__(self, original_weight_tensor: Tensor, input_observer: Any, weight_observer: Any) -> None:
        self.original_weight_tensor = original_weight_tensor
        self.input_observer, self.weight_observer = input_observer, weight_observer

    @classmethod
    def from_float(
        cls,
        original_weight_tensor: Tensor,
        input_observer: nn.Module | None = None,
        weight_observer: nn.Module | None = None,
    ) -> LinearActivationWeightObservedTensor:
        """A weight with observers."""
        return cls(original_weight_tensor.detach(), input_observer, weight_observer)


@LinearActivationWeightObservedTensor.implements(F.linear)
def _linear(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    input, weight, bias = (*args, kwargs.get("bias"))[:3]
    if weight.input_observer is not None:
        input = weight.input_observer(input)
    plain = weight.original_weight_tensor
    if weight.weight_observer is not None:
        plain = weight.weight_observer(plain)
    return F.linear(input, plain, bias)
