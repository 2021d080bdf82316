"""Layers that are trained with the rounding that they will have: `FakeQuantizedLinear`, `FakeQuantizedEmbedding`.

They are `nn.Linear` and `nn.Embedding` with another forward, made of the layer itself: its parameters, its hooks and its
place in the model stay. With quantized inputs they run the product of the quantized layer; otherwise they compute, operation
for operation, what the quantized layer will compute from its dequantized weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import QTensor, Spec
from .learned import learned_fake_quantize, stored


class FakeQuantized(nn.Module):
    """What the two layers have in common: a weight that goes through its Spec on the way to each product.

    spec: of the weight; its `act` is that of the input.
    enabled: False computes as if nothing were quantized.
    weight_scale, weight_zero_point: learned qparams of the weight; None takes them from the weight each time.
    act_scale: learned scale of a static activation; None for a dynamic one, or none.
    lora_a, lora_b: (rank, in) and (out, rank), what is trained in place of the weight; None trains the weight.
    """

    weight: Tensor
    spec: Spec
    enabled: bool
    weight_scale: nn.Parameter | None
    weight_zero_point: nn.Parameter | None
    act_scale: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    lora_factor: float

    def set_up(self, spec: Spec) -> None:
        """Make a prepared layer of one that has just been given this class."""
        self.spec, self.enabled, self.lora_factor = spec, True, 1.0
        for name in OWN_PARAMETERS:
            self.register_parameter(name, None)

    def whole_weight(self) -> Tensor:
        """The weight with its adapter: W + factor * B A."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        return self.weight + self.lora_factor * (self.lora_b @ self.lora_a)

    def fake_quantized_weight(self) -> Tensor:
        """What the quantized weight will dequantize to."""
        weight = self.whole_weight()
        if not self.enabled:
            return weight
        if self.weight_scale is None:
            return self.spec.fake_quantize(weight)
        return learned_fake_quantize(weight, self.spec, self.weight_scale, self.weight_zero_point)

    def quantized(self) -> QTensor:
        """The weight as it will be stored."""
        qparams = {} if self.weight_scale is None else stored(self.spec, self.weight_scale, self.weight_zero_point)
        scale = None if self.act_scale is None else self.act_scale.detach().float().reshape(())
        with torch.no_grad():
            return self.spec.quantize(self.whole_weight().detach(), act_scale=scale, **qparams)

    def tear_down(self) -> None:
        """Take away what `set_up` gave."""
        for name in OWN_PARAMETERS:
            del self._parameters[name]
        del self.spec, self.enabled, self.lora_factor


OWN_PARAMETERS = ("weight_scale", "weight_zero_point", "act_scale", "lora_a", "lora_b")


class _Product(torch.autograd.Function):
    """The product that the quantized layer computes, with the gradients of the product of the rounded numbers.

    rounded: (..., K), what `input` is rounded to. weight: (N, K), what `quantized` dequantizes to.
    """

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, weight: Tensor, input: Tensor, quantized: QTensor) -> Tensor:
        ctx.save_for_backward(rounded, weight)
        return F.linear(input, quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rounded, weight = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(rounded.dtype)
        if ctx.needs_input_grad[1]:
            rows = rounded.reshape(-1, rounded.shape[-1])  # (M, K)
            grad_w = (grad.reshape(-1, grad.shape[-1]).t() @ rows.to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_w, None, None


class FakeQuantizedLinear(FakeQuantized, nn.Linear):
    """y = fake_quantize(x) @ fake_quantize(W).T + bias, summed over the codes if x is quantized. Straight-through gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in) -> (..., out), as the converted layer will compute it; without quantized inputs, as it will where it
        decodes its weight."""
        act, kind = self.spec.act, input.device.type
        if act is None or not self.enabled:
            out = F.linear(input, self.fake_quantized_weight())
        else:
            if torch.is_autocast_enabled(kind):
                input = input.to(torch.get_autocast_dtype(kind))
            if self.act_scale is None:
                rounded = act.fake_quantize(input)
            else:
                rounded = learned_fake_quantize(input, act, self.act_scale.reshape([1] * input.dim()))
            # The numbers that 16-bit codes times scales are rounded to are not those that the quantized layer multiplies, which
            # are the codes.
            out = _Product.apply(rounded, self.fake_quantized_weight(), input.detach(), self.quantized())
        # The bias apart, as the quantized layer adds it.
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FakeQuantizedEmbedding(FakeQuantized, nn.Embedding):
    """Rows of fake_quantize(W)."""

    def forward(self, input: Tensor) -> Tensor:
        """input: indices of any shape -> (..., embedding_dim), as the converted layer will compute it."""
        grid = self.spec.grid(self.weight.shape)
        if grid[0] != self.num_embeddings or not self.enabled:
            return self.rows(input, self.fake_quantized_weight())
        # Blocks within a row: only the rows in question.
        rows = self.rows(input, self.weight)
        if self.weight_scale is None:
            return self.spec.fake_quantize(rows)
        zero = None if self.weight_zero_point is None else F.embedding(input, self.weight_zero_point)
        return learned_fake_quantize(rows, self.spec, F.embedding(input, self.weight_scale), zero)

    def rows(self, input: Tensor, table: Tensor) -> Tensor:
        """`table[input]`, with the gradient that the layer asks for."""
        return F.embedding(input, table, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)


PREPARED: dict[type[nn.Module], type[FakeQuantized]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Embedding: FakeQuantizedEmbedding,
}
"""What a layer becomes."""

PLAIN: dict[type[nn.Module], type[nn.Module]] = {prepared: plain for plain, prepared in PREPARED.items()}
"""And back."""


def enable_fake_quantize(model: nn.Module, enabled: bool = True) -> None:
    """Have the prepared layers of a model round, or not: train without for a while first, and rounding starts late."""
    for module in model.modules():
        if isinstance(module, FakeQuantized):
            module.enabled = enabled


def disable_fake_quantize(model: nn.Module) -> None:
    """`enable_fake_quantize(model, False)`."""
    enable_fake_quantize(model, False)


def parameter_groups(
    model: nn.Module, lr: float, range_lr: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Groups for an optimizer: learned scales and zero points apart, without weight decay.

    lr: of all other parameters that are trained. options: of their group.
    range_lr: of scales, by default lr. A zero point counts steps of its scale, so its rate is divided by the mean scale: then
        a step of an optimizer such as Adam moves numbers by as much either way.
    """
    layers = [m for m in model.modules() if isinstance(m, FakeQuantized)]
    scales = _unique(m.weight_scale for m in layers) + _unique(m.act_scale for m in layers)
    zeros = _unique(m.weight_zero_point for m in layers)
    own = {id(p) for p in (*scales, *zeros)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr, **options}]
    rate = lr if range_lr is None else range_lr
    if scales:
        groups.append({"params": scales, "lr": rate, "weight_decay": 0.0})
    if zeros:
        mean = torch.stack([m.weight_scale.detach().mean() for m in layers if m.weight_scale is not None]).mean()
        groups.append({"params": zeros, "lr": rate / max(float(mean), 1e-6), "weight_decay": 0.0})
    return groups


def _unique(parameters: Iterable[nn.Parameter | None]) -> list[nn.Parameter]:
    """Those that are there and are trained, each once."""
    return list({id(p): p for p in parameters if p is not None and p.requires_grad}.values())
