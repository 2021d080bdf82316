"""Weights that FSDP2 gathers quantized: `CastOnGather`, and the scales of all of them by one all-reduce.

A shard stays in floating point, where the optimizer writes it. When FSDP2 gathers the weight, each rank casts its shard,
one byte per number (float8) or a quarter of one (ternary) travels, and the gathered codes go into the products as they are.
All shards must agree on the scale, which is a maximum or a mean over the whole weight: an all-reduce of one number.
`precompute_float8_dynamic_scale_for_fsdp`, after each optimizer step, does that for all weights at once. Without it the
first gather after a step does it, weight by weight. A scale that was computed before the weight was last written is never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from ao.dtypes import Float8, Intx, QTensor, Spec, reciprocal, view_mode
from ao.matmul import cast_whole

from .placement import is_dtensor

aten = torch.ops.aten

_KEPT = {
    aten.clone.default,
    aten._to_copy.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_empty.default,
    aten._pin_memory.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
}
"""Operators whose results are weights too, beside all views; any other gives plain tensors."""


@dataclass
class Scale:
    """The scale of a whole weight, shared by all views of it.

    value: float32 (1, 1), or None if it is not known, or was computed before the last write.
    inverse: 1 / value.
    version: the writes that the plain tensor had seen. Those through a `CastOnGather` are not among them: they set value to
        None.
    """

    value: Tensor | None = None
    inverse: Tensor | None = None
    version: int = -1


class CastOnGather(torch.Tensor):
    """A floating-point tensor like any other, until FSDP2 gathers it.

    plain: the numbers. spec: how they are quantized for the gather: one scale for the whole weight, or blocks.
    """

    plain: Tensor
    spec: Spec
    scale: Scale

    @staticmethod
    def __new__(cls, plain: Tensor, spec: Spec, scale: Scale | None = None) -> CastOnGather:
        return torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, strides=plain.stride(), storage_offset=plain.storage_offset(), dtype=plain.dtype,
            device=plain.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, plain: Tensor, spec: Spec, scale: Scale | None = None) -> None:
        self.plain, self.spec, self.scale = plain, spec, scale or Scale()

    def __tensor_flatten__(self) -> tuple[list[str], Spec]:
        return ["plain"], self.spec

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], spec: Spec, outer_size: Any, outer_stride: Any
    ) -> CastOnGather:
        return cls(inner["plain"], spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CastOnGather({self.spec}, {self.plain!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func._schema.is_mutable:
            for t in first if isinstance(first, (list, tuple)) else (first,):
                if isinstance(t, CastOnGather):
                    t.scale.value = None
        inner_args, inner_kwargs = tree_map_only(CastOnGather, lambda t: t.plain, (args, kwargs))
        with view_mode(func, first):
            out = func(*inner_args, **inner_kwargs)
            if isinstance(first, CastOnGather) and (func.is_view or func in _KEPT):
                spec, scale = first.spec, first.scale if func.is_view else None
                out = tree_map_only(
                    Tensor, lambda t: CastOnGather(t, spec, scale) if t.dtype.is_floating_point else t, out
                )
        return return_and_correct_aliasing(func, args, kwargs, out)

    # FSDP2.

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The codes of this shard. Raises ValueError, on every rank alike, when dim 0 does not divide evenly."""
        if outer_size[0] % mesh.size():
            raise ValueError(
                f"FSDP: dim 0 of the weight of shape {tuple(outer_size)} does not divide over {mesh.size()} ranks, which its "
                "low-precision all-gather needs; convert this layer without it, or choose another number of ranks"
            )
        if not _is_whole(self.spec):
            q = self.spec.quantize(self.plain)
        else:
            if self.scale.value is None or self.scale.version != self.plain._version:
                _set_scales([self], mesh.get_group(), mesh.size())
            value, inverse = self.scale.value, self.scale.inverse
            assert value is not None and inverse is not None
            q = cast_whole(self.plain, self.spec, value, inverse)
        leaves, world = q.fsdp_pre_all_gather(mesh, outer_size, outer_stride, None, mp_policy)  # type: ignore[attr-defined]
        return leaves, (q, world)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[QTensor, tuple[Tensor, ...]] | None:
        """The gathered weight, quantized."""
        q, world = metadata
        if out is not None and _is_whole(self.spec):
            getattr(out, "_local_tensor", out).scale.copy_(q.scale)
        return q.fsdp_post_all_gather(outputs, world, param_dtype, out=out)


torch.serialization.add_safe_globals([CastOnGather, Scale])


def unwrapped(weight: Any) -> Any:
    """The plain tensor, or DTensor of plain shards, of what may be a `CastOnGather`; storage is shared."""
    if isinstance(weight, CastOnGather):
        return weight.plain
    if is_dtensor(weight) and isinstance(weight._local_tensor, CastOnGather):
        made = type(weight).from_local(
            weight._local_tensor.plain, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
            stride=weight.stride(),
        )  # fmt: skip
        return made
    return weight


def _is_whole(spec: Spec) -> bool:
    return spec.block == (-1, -1)


def precompute_float8_dynamic_scale_for_fsdp(module: nn.Module) -> None:
    """Compute the scales of all weights of `module` that FSDP2 gathers in float8: one all-reduce for all of them.

    Call it after each `optimizer.step()`, outside of compiled code. Raises ValueError if `module` has no such weight: it was
    not converted with enable_fsdp_float8_all_gather=True, or not sharded by `fully_shard`.
    """
    _precompute(module, Float8, "Float8LinearConfig(enable_fsdp_float8_all_gather=True)")


def precompute_bitnet_scale_for_fsdp(module: nn.Module) -> None:
    """The same for the ternary weights of BitNet."""
    _precompute(module, Intx, "BitNetTrainingConfig()")


def _precompute(module: nn.Module, kind: type[Spec], how: str) -> None:
    groups: dict[Any, list[CastOnGather]] = {}
    found = False
    for p in module.parameters():
        local = p._local_tensor if is_dtensor(p) else None  # type: ignore[attr-defined]
        if isinstance(local, CastOnGather) and isinstance(local.spec, kind):
            found = True
            if _is_whole(local.spec):
                groups.setdefault((p.device_mesh, _fsdp_dim(p)), []).append(local)  # type: ignore[attr-defined]
    if not found:
        raise ValueError(
            f"no weight of this module is sharded and cast before it is gathered; convert it with {how}, then call fully_shard"
        )
    for (mesh, dim), weights in groups.items():
        _set_scales(weights, mesh.get_group(dim), mesh.size(dim))


def _fsdp_dim(p: Any) -> int:
    """The mesh dim over which FSDP2 shards a DTensor: it comes before that of tensor parallelism."""
    sharded = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    return sharded[0] if sharded else p.device_mesh.ndim - 1


@torch.no_grad()
def _set_scales(weights: list[CastOnGather], group: Any, size: int) -> None:
    """The scale of each whole weight, from its shards: all of a spec that has one for all."""
    scales = torch.cat([_scale(w.plain, w.spec) for w in weights])
    # A mean over shards of one size is the mean of their means; all else is a maximum.
    mean = isinstance(weights[0].spec, Intx)
    op = torch.distributed.ReduceOp.SUM if mean else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(scales, op=op, group=group)
    if mean:
        scales = scales / size
    # A reciprocal that is exact everywhere is some fifty operators, and FSDP2 runs its hooks eagerly: once for all weights.
    for w, value, inverse in zip(weights, scales.unbind(), reciprocal(scales).unbind(), strict=True):
        w.scale.value, w.scale.inverse, w.scale.version = value.view(1, 1), inverse.view(1, 1), w.plain._version


def _scale(plain: Tensor, spec: Spec) -> Tensor:
    """(1,)"""
    return spec.choose_qparams(plain, (1, 1))["scale"].reshape(1)
