"""torchao.sparsity: `ao.sparsity`, by the names that it has there.

What `sparsify_` and the sparse layouts are given has its zeros: a weight that is not 2:4 is an error here, and is not pruned on
the way. `apply_fake_sparsity` prunes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ao
from ao import Config, Spec
from ao.sparsity import BlockSparseWeightConfig, SemiSparseWeightConfig, Sparsity, prune_
from ao.sparsity import SupermaskLinear as _SupermaskLinear
from ao.sparsity import sparsify_ as _sparsify

from ..core.config import Translated
from ..quantization.quant_api import int8_dynamic_activation_int8_semi_sparse_weight

__all__ = [
    "BlockSparseWeightConfig",
    "PerChannelNormObserver",
    "SemiSparseWeightConfig",
    "SupermaskLinear",
    "WandaSparsifier",
    "apply_fake_sparsity",
    "block_sparse_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "semi_sparse_weight",
    "sparsify_",
]

semi_sparse_weight = SemiSparseWeightConfig
block_sparse_weight = BlockSparseWeightConfig

Filter = Callable[[nn.Module, str], bool]


def sparsify_(model: nn.Module, config: Translated | Config | Spec, filter_fn: Filter | None = None) -> nn.Module:
    """Store weights without their zeros, by `ao.sparsity.sparsify_`, and return the model."""
    _sparsify(model, config.to_ao() if isinstance(config, Translated) else config, filter_fn)
    return model


def apply_fake_sparsity(model: nn.Module, filter_fn: Filter | None = None) -> None:
    """Prune linear layers to 2:4 by magnitude: `ao.sparsity.prune_`."""
    prune_(model, "magnitude", "2:4", filter_fn)


class PerChannelNormObserver(nn.Module):
    """The norm of each input channel over all tokens, `norm` (K,), of what comes by. Without a root in torchao."""

    squares: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.squares = None

    @property
    def norm(self) -> Tensor:
        """(K,). Raises ValueError where nothing came by."""
        if self.squares is None:
            raise ValueError("PerChannelNormObserver: no data came by; run the model first")
        return self.squares.sqrt()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K), which is given back."""
        squares = x.detach().float().reshape(-1, x.shape[-1]).square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares
        return x


class WandaSparsifier:
    """Wanda by hand: `prepare(model)`, run the model on data, `step()`, `squash_mask()`. `ao.sparsity.prune_` does it in one
    call, and lets each layer see what the pruned layers before it give. Scores are those of the paper.

    sparsity_level: the share of zeros of a row. semi_structured_block_size: M for half of each M in its place.
    """

    def __init__(self, sparsity_level: float = 0.5, semi_structured_block_size: int | None = None) -> None:
        size = semi_structured_block_size
        self.sparsity = Sparsity.parse(sparsity_level if size is None else f"{size // 2}:{size}")
        self.model: nn.Module | None = None
        self.watched: dict[nn.Module, tuple[PerChannelNormObserver, Any]] = {}

    def prepare(self, model: nn.Module, config: list[dict[str, str]] | None = None) -> None:
        """Watch the inputs of the linear layers, or of those whose weights `config` names: [{"tensor_fqn": "0.weight"}, ...]."""
        wanted = None if config is None else {entry["tensor_fqn"].removesuffix(".weight") for entry in config}
        self.model = model
        for name, module in model.named_modules():
            if ao.is_linear(module, name) and (wanted is None or name in wanted):
                observer = PerChannelNormObserver()
                handle = module.register_forward_pre_hook(
                    lambda _, args, observer=observer: (observer(args[0]), None)[1]
                )
                self.watched[module] = observer, handle

    @torch.no_grad()
    def step(self) -> None:
        """Set to zero what counts least."""
        for module, (observer, _) in self.watched.items():
            weight: Tensor = module.weight  # type: ignore[assignment]
            weight.mul_(self.sparsity.keep(weight.abs().float() * observer.norm, True))

    def squash_mask(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching. The zeros are in the weights already."""
        for _, handle in self.watched.values():
            handle.remove()
        self.watched.clear()


class SupermaskLinear(_SupermaskLinear):
    """`ao.sparsity.SupermaskLinear`, with its settings before those of `nn.Linear`."""

    def __init__(
        self, sparsity_level: float, blocksize: int, fixed_mask: bool, fixed_weight: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(
            *args,
            sparsity_level=sparsity_level,
            blocksize=blocksize,
            fixed_mask=fixed_mask,
            fixed_weight=fixed_weight,
            **kwargs,
        )
