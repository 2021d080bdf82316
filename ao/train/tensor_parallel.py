"""Tensor parallel styles whose communication is in float8: drop-ins for ColwiseParallel, RowwiseParallel, PrepareModuleInput.

With sequence parallelism (arXiv:2205.05198) the input of a column-wise layer is gathered from shards of the sequence in forward,
and the gradient of a row-wise layer's output in backward. Both are cast to float8 right after; here they are cast before, one
scale for all shards, and half the bytes travel. Sums, the other way, stay in high precision.

Layers converted by any recipe also work under PyTorch's own styles, which communicate in high precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

from ao.dtypes import Float8, QTensor, Spec

from .linear import LowPrecisionLinear

# Renamed in torch 2.13.
_ALL_GATHER: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_REDUCE_SCATTER: Any = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


class Float8ColwiseParallel(ColwiseParallel):
    """`ColwiseParallel` for a layer of the recipe "tensorwise": a sharded input is gathered in float8.

    An input that is quantized already (see `PrepareFloat8ModuleInput`) is taken as it is. Raises ValueError for a layer that
    was not converted, or whose input does not have one scale.
    """

    @staticmethod
    def _prepare_input_fn(input_layouts: Any, desired: Any, mod: Any, inputs: Any, device_mesh: Any) -> Any:
        x = inputs[0]
        if isinstance(x, QTensor):
            return x
        return _gathered(x, input_layouts, device_mesh, mod.recipe.output.a)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        _tensorwise(module, type(self).__name__)
        return super()._apply(module, device_mesh)


class Float8RowwiseParallel(RowwiseParallel):
    """`RowwiseParallel` for a layer of the recipe "tensorwise": where the output is sharded over the sequence, its gradient is
    gathered in float8.

    A layer with a bias, whose gradient is a sum over tokens, gathers in high precision. Raises ValueError as
    `Float8ColwiseParallel` does.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: Any
    ) -> Any:
        if not output_layouts[0].is_shard() or mod.bias is not None:
            return RowwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)
        dim = output_layouts[0].dim % outputs.dim()
        out = _Scatter.apply(outputs.to_local(), mod.recipe.grad_input.a, dim, device_mesh)
        return out if use_local_output else DTensor.from_local(out, device_mesh, output_layouts, run_check=False)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        _tensorwise(module, type(self).__name__)
        return super()._apply(module, device_mesh)


class PrepareFloat8ModuleInput(PrepareModuleInput):
    """`PrepareModuleInput` that gathers in float8, once for all layers that read the input, such as those of q, k and v.

    fwd_config_submodule_fqn: a converted layer of the module whose recipe says how to cast; None takes the first one.

    Inputs that go from Shard to Replicate come as local quantized tensors, whatever `use_local_output` says, for layers under
    `Float8ColwiseParallel`; others as `PrepareModuleInput` gives them.
    """

    def __init__(self, *args: Any, fwd_config_submodule_fqn: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fwd_config_submodule_fqn = fwd_config_submodule_fqn
        self.spec: Spec | None = None

    def _prepare_input_arg(self, input: Any, mesh: Any, input_layout: Any, desired_layout: Any) -> Any:
        if input_layout is None or not input_layout.is_shard() or not desired_layout.is_replicate():
            return super()._prepare_input_arg(input, mesh, input_layout, desired_layout)
        return _gathered(input, (input_layout,), mesh, self.spec)

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        name = self.fwd_config_submodule_fqn
        layers = (
            [module.get_submodule(name)] if name else [m for m in module.modules() if isinstance(m, LowPrecisionLinear)]
        )
        if not layers:
            raise ValueError(
                "PrepareFloat8ModuleInput: the module has no layer that trains in float8; call convert_to_float8_training first"
            )
        self.spec = _tensorwise(layers[0], type(self).__name__)
        return super()._apply(module, device_mesh)


def _tensorwise(module: nn.Module, who: str) -> Spec:
    """The Spec of a layer's input. Raises ValueError unless both products take one cast with one scale."""
    recipe = module.recipe if isinstance(module, LowPrecisionLinear) else None
    if recipe is None:
        raise ValueError(
            f"{who}: {type(module).__name__} does not train in float8; call convert_to_float8_training first"
        )
    for once, again in ((recipe.output.a, recipe.grad_weight.b), (recipe.grad_input.a, recipe.grad_weight.a)):
        if not isinstance(once, Float8) or once.block != (-1, -1) or once != again:
            raise ValueError(
                f"{who} communicates in float8 with one scale, which the recipe ({recipe}) does not have; use the recipe "
                f"'tensorwise', or PyTorch's {who.replace('Float8', '')}"
            )
    assert recipe.output.a is not None
    return recipe.output.a


def _gathered(x: Any, layouts: Any, mesh: Any, spec: Spec | None) -> Any:
    """The whole input, quantized, as a local tensor whose gradient is each rank's part of a sum."""
    if isinstance(x, DTensor):
        layouts, x = x.placements, x.to_local()
    (placement,) = layouts
    if not (placement.is_shard() or placement.is_replicate()):
        raise ValueError(f"an input placed {layouts} cannot be cast before it is summed; redistribute it first")
    dim = placement.dim % x.dim() if isinstance(placement, Shard) else None
    return _Gather.apply(x, spec, dim, mesh)


class _Gather(torch.autograd.Function):
    """Forward: quantize, gather along `dim`. Backward: sum, scatter along `dim`, in the dtype of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Spec, dim: int | None, mesh: Any) -> Tensor:
        ctx.dim, ctx.mesh = dim, mesh
        return spec.quantize(x) if dim is None else _quantize_and_gather(x, spec, dim, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.dim is None:
            return _waited(funcol.all_reduce(grad, "sum", ctx.mesh)), None, None, None
        return _waited(_REDUCE_SCATTER(grad, "sum", ctx.dim, ctx.mesh)), None, None, None


class _Scatter(torch.autograd.Function):
    """Forward: sum, scatter along `dim`. Backward: quantize the gradient, gather along `dim`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Spec, dim: int, mesh: Any) -> Tensor:
        ctx.spec, ctx.dim, ctx.mesh = spec, dim, mesh
        return _waited(_REDUCE_SCATTER(x.contiguous(), "sum", dim, mesh))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _quantize_and_gather(grad, ctx.spec, ctx.dim, ctx.mesh), None, None, None


def _quantize_and_gather(x: Tensor, spec: Spec, dim: int, mesh: Any) -> Tensor:
    """`x` of all ranks along `dim`, with one scale, the largest of all."""
    scale = spec.choose_qparams(x.float(), spec.grid(x.shape))["scale"]
    q: Any = spec.quantize(x, scale=_waited(funcol.all_reduce(scale, "max", mesh)))
    codes = _waited(_ALL_GATHER(q.qdata.view(torch.uint8), dim, mesh)).view(q.qdata.dtype)
    return spec.wrap({"qdata": codes, "scale": q.scale}, x.dtype, codes.shape)


def _waited(t: Tensor) -> Tensor:
    return funcol.wait_tensor(t)
