"""The linear layer whose three matrix products run in low precision: one autograd.Function, driven by a `Recipe`.

Casts are plain PyTorch: under `torch.compile` they become part of the kernels before and after them, and only the products
stay as they are. What is kept for backward is the weight, and the input: as it was, to be cast anew along tokens, or, where one
scale is for all of it, as the codes that the second product takes.

Not done, and why: no scales from earlier steps (delayed scaling), which save one reading of the data and cost a state to
checkpoint and a calibration to get wrong; no casts kept over the microbatches of a step, which would cost a byte per
parameter to save a hundredth of the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ao.dtypes import Operand, QTensor, Spec
from ao.matmul import codes_both, codes_of, codes_of_transposed, has_float8, is_square, scaled_product

from .gather import CastOnGather, unwrapped
from .hadamard import turned
from .placement import is_dtensor, on_shards
from .recipe import Gemm, Recipe


class LowPrecisionLinear(nn.Linear):
    """An `nn.Linear` that trains by a recipe. Parameters and state dict are those of the `nn.Linear` that it was."""

    recipe: Recipe

    def forward(self, input: Tensor) -> Tensor:
        """`F.linear` by the recipe; with a weight that `quantize_` quantized, what that weight's format does."""
        weight = self.weight
        local = weight._local_tensor if is_dtensor(weight) else weight  # type: ignore[attr-defined]
        if isinstance(local, QTensor) and not (weight.requires_grad and local.spec == self.recipe.gather):
            return F.linear(input, weight, self.bias)
        return low_precision_linear(input, weight, self.bias, self.recipe)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Weights that FSDP2 gathers quantized are plain ones in a checkpoint. The storage is shared, as in any state dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if name in destination:
            destination[name] = unwrapped(destination[name])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        name, weight = f"{prefix}weight", self.weight
        new = state_dict.get(name)
        if local_metadata.get("assign_to_params_buffers") and isinstance(weight, CastOnGather) and new is not None:
            # A copy of the dict: the wrapping is no business of the caller's.
            state_dict = {**state_dict, name: new if isinstance(new, CastOnGather) else CastOnGather(new, weight.spec)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def extra_repr(self) -> str:
        """The arguments of the layer, and its recipe."""
        return f"{super().extra_repr()}, {self.recipe}"


def low_precision_linear(x: Tensor, w: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """`F.linear(x, w, bias)` whose products, forward and backward, run by `recipe`.

    x: (..., K), w: (N, K), bias: (N,) -> (..., N) in x's dtype. Under autocast all are cast to its dtype first. A weight
    that is quantized already, by `recipe.gather` (as FSDP2 gathered it), is taken as it is. DTensors are computed on their
    shards, each with scales of its own.

    Raises ValueError where shapes do not fit, also those that a float8 product does not take (unless `recipe.pad`).
    """
    if is_dtensor(x) or is_dtensor(w):
        return on_shards(low_precision_linear, x, w, bias, recipe)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        w = w if isinstance(w, QTensor) else w.to(dtype)
    if x.dim() == 0 or w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"linear: the input of shape {tuple(x.shape)} does not fit the weight of shape {tuple(w.shape)}; "
            "the last dim of the input must be the weight's second"
        )
    tokens = math.prod(x.shape[:-1])
    if not recipe.pad and needs_padding(tokens, w, recipe):
        raise ValueError(
            f"linear: the float8 products of an input of {tokens} tokens with a weight of shape {tuple(w.shape)} need "
            "multiples of 16; choose such batches, leave the layer out with module_filter_fn, or use pad_inner_dim=True"
        )
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Dynamo would differentiate the roundings, whose derivative is zero.
        raise NotImplementedError(
            "linear: torch.compile around a transform of torch.func has no derivative of a layer that trains in low precision; "
            "compile the model inside of the transform, or leave torch.compile out"
        )
    out, *_ = _Linear.apply(x, w, recipe, w.requires_grad and torch.is_grad_enabled())
    return out if bias is None else out + bias.to(out.dtype)


def needs_padding(m: int, w: Tensor, recipe: Recipe) -> bool:
    """Whether the chip's float8 products take these shapes only when they are padded. m: tokens, w: (N, K)."""
    if recipe.emulate or not has_float8(w.device):
        return False
    n, k = w.shape
    used = [recipe.output.is_float8, recipe.grad_input.is_float8, recipe.grad_weight.is_float8 and w.requires_grad]
    return (any(used) and (k % 16 != 0 or n % 16 != 0)) or (used[2] and m % 16 != 0)


class _Linear(torch.autograd.Function):
    """The output, and what backward reads of x: x itself, its codes, or nothing.

    None of them is a view that was made here, which could not be changed in place.
    """

    @staticmethod
    def forward(x: Tensor, w: Tensor, recipe: Recipe, trained: bool) -> tuple[Tensor, ...]:
        gemm, lead = recipe.output, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])  # (M, K)
        kept: tuple[Tensor, ...] = ()
        if trained and _keeps_codes(recipe):
            # One cast for both products of x: the second one is what stays, a byte per number.
            a, turned = codes_both(x, gemm.a)  # type: ignore[arg-type]
            kept = tuple(t.detach() for t in _parts(turned))
        else:
            a = codes_of(x, gemm.a)
        out = _product(a, codes_of(w, gemm.b), gemm, recipe, x.dtype)  # (M, N)
        return out.reshape(*lead, w.shape[0]).detach(), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Recipe, bool], output: tuple[Tensor, ...]) -> None:
        x, w, ctx.recipe, trained = inputs
        _, *kept = output
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, w.dtype)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, *(kept or ([x] if trained else [])))

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *unused: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if g is None:
            return None, None, None, None
        w, *kept = ctx.saved_tensors
        # A Function of its own where somebody could differentiate again, or map over samples.
        gradients = _Gradients.apply if torch.is_grad_enabled() else _Gradients.forward
        wanted = tuple(ctx.needs_input_grad[:2])
        return *gradients(ctx.recipe, wanted, ctx.shape, ctx.dtypes, g, w, *kept), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_Linear, info, in_dims, args)


class _Gradients(torch.autograd.Function):
    """The gradients of x and w, each if it is wanted, from that of the output. kept: x (..., K) or the codes of its transpose."""

    @staticmethod
    def forward(
        recipe: Recipe, wanted: tuple[bool, bool], shape: torch.Size, dtypes: tuple[torch.dtype, torch.dtype],
        g: Tensor, w: Tensor, *kept: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        g = g.reshape(-1, g.shape[-1])  # (M, N)
        first, second = recipe.grad_input, recipe.grad_weight
        rows: Operand | Tensor = g
        columns: Operand | Tensor | None = None
        if all(wanted) and first.a == second.a and is_square(first.a):
            rows, columns = codes_both(g, first.a)  # type: ignore[arg-type]
        elif wanted[0]:
            rows = codes_of(g, first.a)
        grad_x = grad_w = None
        if wanted[0]:
            grad_x = _product(rows, codes_of_transposed(w, first.b), first, recipe, dtypes[0])  # (M, K)
            grad_x = grad_x.reshape(shape)
        if wanted[1]:
            columns = _along_tokens(g, second, second.a, recipe) if columns is None else columns
            if _keeps_codes(recipe):
                b = _joined(kept)
            else:
                b = _along_tokens(kept[0].reshape(-1, shape[-1]), second, second.b, recipe)
            grad_w = _product(columns, b, second, recipe, dtypes[1])
        return grad_x, grad_w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            "linear: a layer that trains in low precision has no second derivative, since what its gradients multiply is "
            "rounded; call convert_from_low_precision_training first, or leave the layer out with module_filter_fn"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_Gradients, info, in_dims, args)


def _one_by_one(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """`function` under vmap: each sample has scales of its own, as without vmap."""
    samples = []
    for i in range(info.batch_size):
        dims = zip(args, in_dims)
        samples.append(
            function.apply(*(a if d is None or not isinstance(a, Tensor) else a.select(d, i) for a, d in dims))
        )
    stacked = tuple(None if each[0] is None else torch.stack(each) for each in zip(*samples))
    return stacked, tuple(None if t is None else 0 for t in stacked)


def _along_tokens(x: Tensor, gemm: Gemm, spec: Spec | None, recipe: Recipe) -> Operand | Tensor:
    """The transpose of x (M, C), an operand of `gemm`, quantized by `spec`: (C, M), or (C, M') with zeros at the end."""
    missing = -x.shape[0] % gemm.multiple if recipe.pad else 0
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return codes_of(turned(x.t(), gemm.hadamard), spec) if gemm.hadamard else codes_of_transposed(x, spec)


def _keeps_codes(recipe: Recipe) -> bool:
    """Whether the codes of x serve both of its products."""
    return recipe.grad_weight.b == recipe.output.a and is_square(recipe.output.a)


def _parts(codes: Operand | Tensor) -> tuple[Tensor, ...]:
    return (codes.codes, codes.scale) if isinstance(codes, Operand) else (codes,)


def _joined(parts: tuple[Tensor, ...]) -> Operand | Tensor:
    """What `_parts` took apart."""
    if len(parts) == 1:
        return parts[0]
    codes, scale = parts
    return Operand(codes, scale, None, "float" if codes.is_floating_point() else "affine")


def _product(a: Operand | Tensor, b: Operand | Tensor, gemm: Gemm, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """a @ b.T. a: (M, K), b: (N, K)."""
    if recipe.pad and isinstance(a, Operand) and isinstance(b, Operand):
        m, n = a.codes.shape[0], b.codes.shape[0]
        a, b = pad_to_16(a), pad_to_16(b)
        return scaled_product(a, b, dtype, fast_accum=gemm.fast_accum, emulate=recipe.emulate)[:m, :n]
    return scaled_product(a, b, dtype, fast_accum=gemm.fast_accum, emulate=recipe.emulate)


def pad_to_16(codes: Operand) -> Operand:
    """`codes` with zeros after rows and columns up to the next multiple of 16; as they are where a block is part of a row."""
    values, scale = codes.codes, codes.scale
    rows, columns = -values.shape[0] % 16, -values.shape[1] % 16
    if not codes.by_row or rows == columns == 0:
        return codes
    # A zero is the byte 0 in every format, and not every format can be padded.
    padded = F.pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)
    scale = scale if scale.shape[0] == 1 else F.pad(scale, (0, 0, 0, rows))
    return codes._replace(codes=padded, scale=scale)
