"""Faster attention for the image encoders of transformers that have decomposed relative positions: SAM, SAM-HQ, GOT-OCR2.

    from ao.integrations.transformers import fuse_relative_positions

    fuse_relative_positions(model)

Their own attention adds a position to the score of every pair of tokens, and makes a mask of these first: 4 GB in a block
without windows, for 8 images of 1024 x 1024. Here the kernel adds them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..matmul import relative_attention, takes_relative_attention

_NEEDED = ("qkv", "proj", "rel_pos_h", "rel_pos_w", "get_decomposed_rel_pos", "num_attention_heads", "scale")


def fuse_relative_positions(model: nn.Module) -> int:
    """Let the attention layers with decomposed relative positions in `model` add them in the kernel. Returns how many there are.

    model: one with an image encoder of transformers' SAM, SAM-HQ, GOT-OCR2 or another one with layers like theirs, or such a
        layer itself. Before or after `quantize_` and `.to()`, and before it is compiled.

    A layer computes softmax(scale q.k + q.h + q.w) v as before, in float32 from 16-bit numbers, without a mask, in eager mode and
    compiled. It does so on an NVIDIA GPU since Ampere, in bfloat16 or float16, without gradients (`torch.no_grad()`), and for
    images of up to 128 x 128 patches; everywhere else, and where attention weights are asked for by `output_attentions`, it is
    what it was. Its class is derived from the one that it had; parameters and the state dict stay the same.

    Raises ValueError where there is no such layer.
    """
    found = [module for module in model.modules() if _is_relative(module)]
    if not found:
        raise ValueError(
            f"fuse_relative_positions: model {type(model).__name__} has no attention layer with decomposed relative positions; "
            "it is for models with an image encoder such as that of SAM, SAM-HQ or GOT-OCR2, with use_rel_pos=True"
        )
    for module in found:
        module.__class__ = _class_of(type(module))  # type: ignore[arg-type]
    return len(found)


def _is_relative(module: nn.Module) -> bool:
    return getattr(module, "use_rel_pos", False) and all(hasattr(module, name) for name in _NEEDED)


class _RelativeAttention:
    """What an attention layer of transformers has before its own class."""

    own_class: type[nn.Module]
    qkv: nn.Module
    proj: nn.Module
    rel_pos_h: Tensor
    rel_pos_w: Tensor
    num_attention_heads: int
    scale: float
    dropout: float
    training: bool

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> Any:
        """hidden_states (B, H, W, C) -> the same, and None for the attention weights."""
        height, width = hidden_states.shape[1:3]
        # An exported program runs where this package is not.
        stays = output_attentions or torch.compiler._is_exporting_flag or self._needs_gradient(hidden_states)
        dropped = self.training and getattr(self, "dropout", 0.0) > 0
        head_dim = self.rel_pos_h.shape[1]
        if stays or dropped or not takes_relative_attention(hidden_states, head_dim, height, width):
            return super().forward(hidden_states, output_attentions)  # type: ignore[misc]
        out = relative_attention(
            self.qkv(hidden_states).flatten(1, 2), _table(self.rel_pos_h, height), _table(self.rel_pos_w, width),
            self.num_attention_heads, height, width, self.scale,
        )  # fmt: skip
        return self.proj(out.unflatten(1, (height, width))), None

    def _needs_gradient(self, x: Tensor) -> bool:
        trained = (p.requires_grad for p in self.parameters())  # type: ignore[attr-defined]
        return torch.is_grad_enabled() and (x.requires_grad or any(trained))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as one of its own class that is fused."""
        return _remade, (self.own_class,), self.__dict__


def _table(positions: Tensor, size: int) -> Tensor:
    """The positions (2 size - 1, D) for an image of `size` rows or columns, interpolated as the model does it."""
    if positions.shape[0] == 2 * size - 1:
        return positions
    return F.interpolate(positions.t()[None], size=2 * size - 1, mode="linear")[0].t()


def _remade(own_class: type[nn.Module]) -> nn.Module:
    """A fused layer, to which its attributes come."""
    cls = _class_of(own_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _class_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The class for a layer of class `cls`, with its name."""
    if issubclass(cls, _RelativeAttention):
        return cls
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "own_class": cls}
    made: Any = type(cls.__name__, (_RelativeAttention, cls), own)
    return made
