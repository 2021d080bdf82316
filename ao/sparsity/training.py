"""Training with weights that are pruned at every step: `SemiSparseLinear`.

At every step the weight is pruned to a mask that is 2:4 along its rows and along its columns, so that the forward product and the
gradient of the input can both run on NVIDIA's sparse units; the gradient of the weight is dense, and passes straight through the
mask to all of it (arXiv:2102.08124). Two of three products gain, for many tokens and large layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..matmul import both_pruned, pruned_both, semi_sparse_product


class _SparseLinear(torch.autograd.Function):
    """y = x @ (mask * W).T, with gradients of the pruned weight for x, and dense ones, straight through the mask, for W.

    x is (M, K): Dynamo of torch 2.11 refuses shapes that are computed in here where they are symbols.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        pruned, turned = pruned_both(weight.detach(), x.shape[0])
        ctx.save_for_backward(x, turned)
        return semi_sparse_product(x, pruned, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, turned = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = semi_sparse_product(grad.contiguous(), turned, x.shape[1])
        if ctx.needs_input_grad[1]:
            grad_w = grad.t() @ x
        return grad_x, grad_w


class SemiSparseLinear(nn.Linear):
    """`nn.Linear` whose weight is pruned at every step to two of four, along rows and columns.

    The weight that is trained stays dense; `sparse_weight` is what it computes with. Shapes (N, K) are multiples of 4.
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear) -> SemiSparseLinear:
        """The layer itself, of this class: its parameters, its hooks and its place in the model stay.

        Raises TypeError for another type of layer, ValueError for a shape that is no multiple of 4.
        """
        _check(linear, "")
        linear.__class__ = cls
        return linear  # type: ignore[return-value]

    @classmethod
    def to_dense(cls, linear: SemiSparseLinear) -> nn.Linear:
        """The layer as an `nn.Linear` with the dense weight that was trained."""
        linear.__class__ = nn.Linear  # type: ignore[assignment]
        return linear

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """The weight with its zeros, (N, K)."""
        return both_pruned(self.weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K) -> (..., N)."""
        kind, weight = input.device.type, self.weight
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, weight = input.to(dtype), weight.to(dtype)
        rows = input.reshape(-1, input.shape[-1])  # (M, K)
        out = _SparseLinear.apply(rows, weight).reshape(*input.shape[:-1], weight.shape[0])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _SparseActivation(torch.autograd.Function):
    """x with two of four along both dims, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % 4))
        return both_pruned(padded)[: rows.shape[0]].reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SemiSparseActivationLinear(SemiSparseLinear):
    """`nn.Linear` whose input is pruned to two of four, and whose weight is not."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K) -> (..., N)."""
        return F.linear(_SparseActivation.apply(input), self.weight, self.bias)

    @torch.no_grad()
    def sparse_weight(self) -> Tensor:
        """The weight, which is dense."""
        return self.weight.detach()


def _check(linear: nn.Module, name: str) -> None:
    at = f"{name}: " if name else ""
    if type(linear) is not nn.Linear:
        raise TypeError(f"{at}SemiSparseLinear is for nn.Linear, and this is {type(linear).__name__}; leave it out")
    if any(n % 4 for n in linear.weight.shape):
        raise ValueError(
            f"{at}a weight that is 2:4 along both dims has dims that are multiples of 4, got {tuple(linear.weight.shape)}; leave "
            "it out"
        )


def swap_linear_with_semi_sparse_linear(
    model: nn.Module, config: Mapping[str, type[SemiSparseLinear]], current: str = ""
) -> None:
    """Prune the weights of some linear layers at every step from now on.

    config: {full name of a layer: SemiSparseLinear or SemiSparseActivationLinear}. "" is the model itself, where it is an
        `nn.Linear`. current: a prefix of the names, for models that are a part of another.

    Raises ValueError for a name that is no layer and for a shape that is no multiple of 4, TypeError for what is no `nn.Linear`
    and no such class; then nothing has changed.
    """
    start = f"{current}." if current else ""
    layers = {f"{start}{name}".rstrip("."): module for name, module in model.named_modules()}
    for name, cls in config.items():
        if name not in layers:
            raise ValueError(f"swap_linear_with_semi_sparse_linear: the model has no layer {name!r}")
        if not (isinstance(cls, type) and issubclass(cls, SemiSparseLinear)):
            raise TypeError(f"{name}: the class must be SemiSparseLinear or SemiSparseActivationLinear, got {cls!r}")
        _check(layers[name], name)
    for name, cls in config.items():
        layers[name].__class__ = cls


def swap_semi_sparse_linear_with_linear(model: nn.Module, current: str = "") -> None:
    """The inverse: the layers are `nn.Linear` again, with the dense weights that were trained. `ao.sparsity.sparsify_` stores
    what they computed with."""
    for module in model.modules():
        if isinstance(module, SemiSparseLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
