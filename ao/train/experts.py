"""Mixtures of experts that train in low precision: the grouped products of 3-D weights, by the recipe of a linear layer.

A model multiplies its experts by `torch.nn.functional.grouped_mm`, `torch.bmm` or `matmul`. Parameters that were converted
are tensors as before, and those functions, given one of them or a transpose of it, run by its recipe: forward and
both gradients, expert by expert. Tokens of an expert are filled up with zeros to what its products want.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .linear import low_precision_linear
from .recipe import Recipe
from .training_config import RecipeConfig


@_disable_dynamo  # torch.compiler.disable would import the compiler
def low_precision_grouped_mm(x: Tensor, w: Tensor, offs: Tensor, recipe: Recipe) -> Tensor:
    """Rows [offs[e - 1], offs[e]) of `x` times `w[e]`, forward and backward by `recipe`.

    x: (M, K), sorted by expert. w: (E, K, N), the transpose of the experts' weights. offs: (E,) int32, where each expert's rows
    end; rows after the last are zero -> (M, N) in x's dtype. Each expert has scales of its own. It waits for `offs`, so
    that compiled code has a break here.

    Raises ValueError for shapes that are none of these.
    """
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1] or offs.shape != (w.shape[0],):
        raise ValueError(
            "low_precision_grouped_mm: x must be (M, K), w (E, K, N) and offs (E,), got "
            f"{tuple(x.shape)}, {tuple(w.shape)} and {tuple(offs.shape)}"
        )
    ends = offs.tolist()
    parts = x.split([stop - start for start, stop in zip([0, *ends], [*ends, x.shape[0]])])
    rows = [_product(part, expert, recipe) for part, expert in zip(parts, w.unbind())]
    return torch.cat([*rows, x.new_zeros(parts[-1].shape[0], w.shape[2])])


@_disable_dynamo  # torch.compiler.disable would import the compiler
def low_precision_bmm(x: Tensor, w: Tensor, recipe: Recipe) -> Tensor:
    """x[e] @ w[e], forward and backward by `recipe`. x: (E, M, K), w: (E, K, N) -> (E, M, N) in x's dtype.

    Raises ValueError for shapes that are none of these.
    """
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0] or x.shape[2] != w.shape[1]:
        raise ValueError(
            f"low_precision_bmm: x must be (E, M, K) and w (E, K, N), got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    return torch.stack([_product(rows, expert, recipe) for rows, expert in zip(x.unbind(), w.unbind())])


def _product(x: Tensor, w: Tensor, recipe: Recipe) -> Tensor:
    """x (M, K) @ w (K, N)."""
    return low_precision_linear(x, w.t(), None, recipe) if x.shape[0] else x @ w.to(x.dtype)


class TrainedExperts(Tensor):
    """A 3-D weight whose products run by a recipe. It is a tensor like any other in all else."""

    recipe: Recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedExperts:
        if id(self) not in memo:
            copy: Any = self.detach().clone()
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine: Any = next((t for t in args if isinstance(t, TrainedExperts)), None)
        recipe = None if mine is None else getattr(mine, "recipe", None)
        with torch._C.DisableTorchFunctionSubclass():
            if recipe is not None and len(args) > 1 and args[1] is mine and mine.dim() == 3:
                x, w = args[0], mine.as_subclass(Tensor)
                if func in _GROUPED:
                    offs = args[2] if len(args) > 2 else kwargs.get("offs")
                    if offs is not None and x.dim() == 2:
                        return low_precision_grouped_mm(x, w, offs, recipe)
                if func in _BATCHED and x.dim() == 3:
                    return low_precision_bmm(x, w, recipe)
            out = func(*args, **kwargs)
            if recipe is not None and func in _KEPT and not isinstance(out, TrainedExperts):
                out = out.as_subclass(TrainedExperts)
                out.recipe = recipe
        return out


_GROUPED: set[Any] = {F.grouped_mm, torch._grouped_mm}
_BATCHED: set[Any] = {torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__}
_MT: Any = Tensor.mT
_KEPT: set[Any] = {
    Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, _MT.__get__, Tensor.contiguous, Tensor.to,
    Tensor.bfloat16, Tensor.half, Tensor.float, Tensor.detach, Tensor.clone,
}  # fmt: skip
"""What leaves a weight a weight."""


def convert_experts_to_low_precision_training(
    module: nn.Module, config: RecipeConfig, *, parameter_filter_fn: Callable[[str], bool] | None = None
) -> list[str]:
    """Let the 3-D parameters of a model, the weights of its experts, train by a config, in place; returns their names.

    config: `Float8LinearConfig`, `MXFP8TrainingConfig` or another that has a recipe.
    parameter_filter_fn: fully qualified name -> bool, which to take of the floating-point parameters with three dims.

    Convert before the optimizer is made. The state dict has the same tensors under the same names; a model that loads
    one with assign=True is to be converted again. Raises ValueError where no parameter is left, or one was converted before, and
    TypeError for a config without a recipe.
    """
    if not isinstance(config, RecipeConfig) or isinstance(config, type):
        raise TypeError(f"experts train by a config with a recipe, such as Float8LinearConfig(), got {config!r}")
    found = []
    for prefix, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            full = f"{prefix}.{name}" if prefix else name
            if parameter is None or parameter.dim() != 3 or not parameter.is_floating_point():
                continue
            if parameter_filter_fn is None or parameter_filter_fn(full):
                if isinstance(parameter, TrainedExperts):
                    raise ValueError(f"{full} trains in low precision already")
                found.append((full, owner, name, parameter))
    if not found:
        raise ValueError(
            "no weights of experts to convert: the model has no floating-point parameter of three dims"
            + ("" if parameter_filter_fn is None else " that parameter_filter_fn takes")
        )
    recipe = replace(config.recipe(), pad=True)
    for _, owner, name, parameter in found:
        made = parameter.detach().as_subclass(TrainedExperts)
        made.recipe = recipe
        new = nn.Parameter(made, requires_grad=parameter.requires_grad)
        new.recipe = recipe  # type: ignore[attr-defined]
        owner._parameters[name] = new
    return [full for full, *_ in found]
