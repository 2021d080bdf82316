"""torchao.quantization.linear_activation_scale: a quantized weight whose activation is divided by a scale per channel."""

from __future__ import annotations

from torch import Tensor

from ao import QTensor

__all__ = ["to_weight_tensor_with_linear_activation_scale_metadata"]


def to_weight_tensor_with_linear_activation_scale_metadata(input_float: QTensor, scale: Tensor) -> QTensor:
    """The weight, `F.linear(x, w)` of which is what `F.linear(x / scale, input_float)` was. scale: (K,).

    Raises TypeError for a weight that is not quantized.
    """
    if not isinstance(input_float, QTensor):
        raise TypeError("to_weight_tensor_with_linear_activation_scale_metadata takes a quantized weight")
    fields: dict[str, Tensor | None] = dict(input_float.fields())
    pre_scale = 1.0 / scale.float().reshape(1, -1)
    fields["pre_scale"] = pre_scale if input_float.pre_scale is None else input_float.pre_scale * pre_scale
    return input_float.like(input_float.shape, input_float.dtype, fields)
