"""`SupermaskLinear`: the blocks that a layer keeps are learned, by a score for each (arXiv:1911.13299)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Top(torch.autograd.Function):
    """1 for the largest scores, 0 for the others; the gradient goes straight through to all scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: int) -> Tensor:
        mask = torch.zeros(scores.numel(), dtype=scores.dtype, device=scores.device)
        return mask.index_fill_(0, scores.flatten().topk(keep).indices, 1.0).view(scores.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SupermaskLinear(nn.Linear):
    """`nn.Linear` that multiplies by the blocks of its weight with the largest scores: y = x @ (mask * W).T + b.

    sparsity_level: the share of blocks that are left out, 0 to less than 1.
    blocksize: blocks are (blocksize, blocksize), and divide the weight (N, K).
    fixed_mask: the scores are not trained. fixed_weight: the weight is not; as in the paper, the scores alone learn.

    scores: (N / blocksize, K / blocksize), at first the mean of |W| over each block. Their gradient is that of the mask, which
    is dense. `to_linear` gives a plain layer with the zeros, for `sparsify_(model, BlockSparseWeightConfig(blocksize))`.

    Raises ValueError for a level or a block out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity_level: float = 0.5,
        blocksize: int = 1,
        fixed_mask: bool = False,
        fixed_weight: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= sparsity_level < 1:
            raise ValueError(f"SupermaskLinear: sparsity_level must be 0 to less than 1, got {sparsity_level}")
        if blocksize < 1 or in_features % blocksize or out_features % blocksize:
            raise ValueError(
                f"SupermaskLinear: blocksize={blocksize} does not divide a weight of shape ({out_features}, {in_features})"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.sparsity_level, self.blocksize = sparsity_level, blocksize
        self.weight.requires_grad_(not fixed_weight)
        self.scores = nn.Parameter(self._sizes(), requires_grad=not fixed_mask)

    def _sizes(self) -> Tensor:
        n, k, size = *self.weight.shape, self.blocksize
        return self.weight.detach().abs().view(n // size, size, k // size, size).mean((1, 3))

    def mask(self) -> Tensor:
        """1 where the weight is kept, 0 elsewhere: (N, K)."""
        keep = max(1, round((1 - self.sparsity_level) * self.scores.numel()))
        blocks = _Top.apply(self.scores, keep)
        return blocks.repeat_interleave(self.blocksize, 0).repeat_interleave(self.blocksize, 1)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K) -> (..., N)."""
        return F.linear(input, self.weight * self.mask(), self.bias)

    def extra_repr(self) -> str:
        """What a printed model says of it."""
        return f"{super().extra_repr()}, sparsity_level={self.sparsity_level}, blocksize={self.blocksize}"

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, sparsity_level: float = 0.0, blocksize: int = 1, **more: Any
    ) -> SupermaskLinear:
        """The layer with scores: it has the memory of `linear`'s weight and bias. more: `fixed_mask`, `fixed_weight`."""
        n, k = linear.weight.shape
        has_bias = linear.bias is not None
        made = SupermaskLinear(
            k, n, has_bias, sparsity_level=sparsity_level, blocksize=blocksize, device="meta", **more
        )
        made.weight = nn.Parameter(linear.weight.detach(), requires_grad=made.weight.requires_grad)
        made.bias = linear.bias
        made.scores = nn.Parameter(made._sizes(), requires_grad=made.scores.requires_grad)
        made.__class__ = cls
        return made.train(linear.training)

    @classmethod
    def to_linear(cls, supermask_linear: SupermaskLinear) -> nn.Linear:
        """A plain layer whose weight has the zeros."""
        n, k = supermask_linear.weight.shape
        made = nn.Linear(k, n, supermask_linear.bias is not None, device="meta")
        with torch.no_grad():
            made.weight = nn.Parameter(supermask_linear.weight * supermask_linear.mask())
        made.bias = supermask_linear.bias
        return made.train(supermask_linear.training)
