"""The layers of quantization-aware training: those of `ao.quant.qat`, with fake quantizers that can be looked at and set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ao.quant.qat as qat
from ao import Float8, QTensor, Spec
from ao.matmul import set_parameter

from .fake_quantize_config import FakeQuantizeConfigBase, Float8FakeQuantizeConfig
from .fake_quantizer import FakeQuantizer, FakeQuantizerBase, Float8FakeQuantizer

Part = FakeQuantizeConfigBase | Spec | None


def _quantizer(part: Part, activation: bool) -> FakeQuantizerBase | None:
    if part is None:
        return None
    kind = Float8FakeQuantizer if isinstance(part, (Float8, Float8FakeQuantizeConfig)) else FakeQuantizer
    return kind(part, activation)


class Prepared:
    """What the two layers have in common."""

    weight: Tensor
    weight_fake_quantizer: FakeQuantizerBase | None
    activation_fake_quantizer: FakeQuantizerBase | None
    converts: bool = False
    """Whether the layer was made of another one, which will be quantized: it then runs the product of the quantized layer."""

    def prepare(self, activation: Part, weight: Part) -> None:
        """Give a layer, which has just been given this class, its fake quantizers.

        Raises ValueError where a group does not divide the weight's rows.
        """
        layer: Any = self
        layer.activation_fake_quantizer = _quantizer(activation, True)
        layer.weight_fake_quantizer = _quantizer(weight, False)
        if layer.weight_fake_quantizer is not None:
            spec = layer.weight_fake_quantizer.spec
            spec.grid(layer.weight.shape)
            wide = getattr(activation, "dtype", None) is torch.int16  # which nothing is stored in
            if layer.activation_fake_quantizer is not None and not wide:
                spec = replace(spec, act=layer.activation_fake_quantizer.spec)
            layer.set_up(spec)

    @property
    def quantizers(self) -> list[FakeQuantizerBase]:
        """Those that are there."""
        return [q for q in (self.activation_fake_quantizer, self.weight_fake_quantizer) if q is not None]

    @property
    def by_the_book(self) -> bool:
        """Whether the layer computes what the quantized one will: all is rounded, by qparams found anew."""
        there = self.weight_fake_quantizer is not None and self.converts
        return there and all(q.enabled and not q.keeps for q in self.quantizers)

    def plain(self) -> Any:
        """The layer as it was, with the weight that was trained; in place."""
        layer: Any = self
        if layer.weight_fake_quantizer is not None:
            layer.tear_down()
        del layer.activation_fake_quantizer, layer.weight_fake_quantizer
        layer.__dict__.pop("converts", None)
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Embedding
        return layer

    def quantized_weight(self) -> QTensor:
        """The weight with the qparams that were kept or trained. Raises ValueError for a layer whose weight is not rounded."""
        layer: Any = self
        quantizer = layer.weight_fake_quantizer
        if quantizer is None:
            raise ValueError("the weight of this layer is not quantized")
        kept = {"scale": quantizer.scale, "zero_point": quantizer.zero_point}
        kept = {name: t.detach().float() for name, t in kept.items() if t is not None}
        known = layer.spec.stored(**kept) if quantizer.keeps and kept else {}
        return layer.spec.quantize(self.weight.detach(), **known)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round, or not."""
        for q in self.quantizers:
            q.enabled = enabled

    def disable_fake_quant(self) -> None:
        """Do not round."""
        self.enable_fake_quant(False)


class FakeQuantizedLinear(Prepared, qat.FakeQuantizedLinear):
    """A linear layer that rounds its input and its weight. A config of None leaves one of them as it is."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation_config: Part = None,
        weight_config: Part = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, *args, **kwargs)
        self.prepare(activation_config, weight_config)

    @classmethod
    def from_linear(cls, mod: Any, activation_config: Part = None, weight_config: Part = None) -> Any:
        """Make one of a linear layer, in place."""
        mod.__class__ = FakeQuantizedLinear
        try:
            mod.prepare(activation_config, weight_config)
            mod.converts = True
        except Exception:
            for name in ("activation_fake_quantizer", "weight_fake_quantizer"):
                if hasattr(mod, name):
                    delattr(mod, name)
            mod.__class__ = nn.Linear
            raise
        return mod

    def to_linear(self) -> nn.Linear:
        """The plain layer with the weight that was trained; in place."""
        return self.plain()

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in) -> (..., out)."""
        if self.by_the_book:
            return super().forward(input)
        a, w = self.activation_fake_quantizer, self.weight_fake_quantizer
        input = input if a is None else a(input)
        return F.linear(input, self.weight if w is None else w(self.weight), self.bias)


class FakeQuantizedEmbedding(Prepared, qat.FakeQuantizedEmbedding):
    """An embedding that rounds its weight."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        weight_config: Part = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            *args, **kwargs,
        )  # fmt: skip
        self.prepare(None, weight_config)

    @classmethod
    def from_embedding(cls, mod: Any, weight_config: Part = None) -> Any:
        """Make one of an embedding, in place."""
        mod.__class__ = FakeQuantizedEmbedding
        try:
            mod.prepare(None, weight_config)
            mod.converts = True
        except Exception:
            for name in ("activation_fake_quantizer", "weight_fake_quantizer"):
                if hasattr(mod, name):
                    delattr(mod, name)
            mod.__class__ = nn.Embedding
            raise
        return mod

    def to_embedding(self) -> nn.Embedding:
        """The plain layer with the weight that was trained; in place."""
        return self.plain()

    def forward(self, input: Tensor) -> Tensor:
        """input: indices of any shape."""
        if self.by_the_book:
            return super().forward(input)
        w = self.weight_fake_quantizer
        return self.rows(input, self.weight if w is None else w(self.weight))


def enable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: round."""
    if isinstance(module, Prepared):
        module.enable_fake_quant()


def disable_fake_quant(module: nn.Module) -> None:
    """For `model.apply`: do not round."""
    if isinstance(module, Prepared):
        module.disable_fake_quant()


def initialize(module: nn.Module) -> None:
    """Keep the qparams of the weight, where they are to be kept."""
    if isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
        q = module.weight_fake_quantizer
        if q is not None and q.keeps and q.scale is None:
            q.initialize(module.weight)


def set_weight(layer: Any, weight: QTensor) -> None:
    """Put a quantized weight in a plain layer."""
    set_parameter(layer, "weight", torch.nn.Parameter(weight, requires_grad=False))
