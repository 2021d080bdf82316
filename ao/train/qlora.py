"""QLoRA: a frozen 4-bit base under small trained adapters (arXiv:2305.14314; LoRA: arXiv:2106.09685).

    out = x @ w.T + (alpha / rank) * (x @ A.T) @ B.T,        w (N, K) NF4, A (rank, K), B (N, rank)

The base stays packed: a training step decodes it for forward and again for backward, so that it costs its 4.1 bits per number and
no more; FSDP2 shards and gathers the packed fields. Merging writes w + (alpha / rank) * B @ A back into the base, rounded to
its format.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ao.dtypes import NF4, QTensor, Spec
from ao.matmul import QuantizedLayer, layer_class, set_parameter

from .placement import is_dtensor

Filter = Callable[[nn.Module, str], bool]


class LoRALinear(QuantizedLayer, nn.Linear):
    """An `nn.Linear` whose weight and bias are frozen, with a trained product of two small matrices beside it.

    lora_A: (rank, K), uniform at the start. lora_B: (N, rank), zero at the start, so that nothing changes.
    alpha: the adapter is scaled by alpha / rank. dropout: of the adapter's input, in training.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    alpha: float
    dropout: float

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.lora_A.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K) -> (..., N)."""
        out = self.product(input)
        x = F.dropout(input, self.dropout, self.training)
        return out + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (N, K) float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    def extra_repr(self) -> str:
        """The arguments of the layer, and its adapter."""
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, alpha={self.alpha}, dropout={self.dropout}"


def convert_to_qlora(
    module: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    base: Spec | None = NF4,
    dtype: torch.dtype | None = None,
    module_filter_fn: Filter | None = None,
) -> nn.Module:
    """Freeze a model, quantize the weights of its linear layers, and give each an adapter, in place; the model is returned.

    rank, alpha, dropout: of the adapters.
    base: the format of the weights; None leaves them as they are. Weights that are quantized already stay as they are.
    dtype: of the adapters; None is that of each weight.
    module_filter_fn: `(module, fully qualified name) -> bool`, which layers; by default every `nn.Linear`.

    All other parameters are frozen too; unfreeze what else shall train. Every layer is checked before the first one changes.
    Raises ValueError where no layer is left, for a shape that `base` does not take, and for a rank or dropout out of range.
    """
    if rank < 1:
        raise ValueError(f"convert_to_qlora: rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"convert_to_qlora: dropout must be at least 0 and below 1, got {dropout}")
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if layer_class(layer) is nn.Linear and (module_filter_fn is None or module_filter_fn(layer, name))
    ]
    if not layers:
        raise ValueError("convert_to_qlora: no layer to convert; module_filter_fn takes none, or there is no nn.Linear")
    for name, layer in layers:
        if is_dtensor(layer.weight):
            raise ValueError(f"{name}: the weight is a DTensor already; convert the model before it is sharded")
        if base is not None and not isinstance(layer.weight, QTensor):
            try:
                base.quantize(torch.empty(layer.weight.shape, device="meta", dtype=layer.weight.dtype))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    module.requires_grad_(False)
    packed: dict[int, nn.Parameter] = {}
    for _, layer in layers:
        weight = layer.weight
        if base is not None and not isinstance(weight, QTensor):
            if id(weight) not in packed:
                packed[id(weight)] = nn.Parameter(base.quantize(weight.detach()), requires_grad=False)
            layer.weight = packed[id(weight)]
        layer.__class__ = LoRALinear
        assert isinstance(layer, LoRALinear)
        kept = dtype or weight.dtype
        layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, dtype=kept, device=weight.device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=kept, device=weight.device))
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        layer.alpha, layer.dropout = alpha, dropout
    return module


def merge_qlora(module: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Put every adapter into its base, in place, and make plain `nn.Linear` layers again; the model is returned.

    dtype: None keeps the format of the base, into which the sum is rounded; a floating-point dtype makes plain weights that hold
        the sum as it is.

    Raises ValueError where there is no adapter, or a layer is sharded (gather the model first).
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear)]
    if not layers:
        raise ValueError("merge_qlora: the model has no LoRALinear; convert_to_qlora makes them")
    for name, layer in layers:
        if is_dtensor(layer.weight) or is_dtensor(layer.lora_A):
            raise ValueError(
                f"{name}: merging needs whole weights, and this one is sharded; load its state dict elsewhere"
            )
    for _, layer in layers:
        weight, delta = layer.weight.detach(), layer.delta()
        values = (weight.dequantize() if isinstance(weight, QTensor) else weight).float() + delta
        if dtype is not None or not isinstance(weight, QTensor):
            layer.weight = nn.Parameter(values.to(dtype or weight.dtype), requires_grad=False)
        else:
            weight.copy_(values)
        for name in ("lora_A", "lora_B", "alpha", "dropout"):
            delattr(layer, name)
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        set_parameter(layer, "weight", layer.weight)
    return module
