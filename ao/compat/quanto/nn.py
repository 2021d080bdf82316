"""quanto's modules over the tensors of ao: `QLinear`, `QConv2d`, `QLayerNorm`.

A module has a float weight that is rounded at each call, with a straight-through gradient, until `freeze` puts a QTensor in its
place. What comes out of a module is floating point: the next one quantizes its own input, by the scale that `Calibration`
found, or leaves it as it is where there was none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import Intx, QTensor, Spec, dense, pack, pack_dim
from ...matmul import QuantizedLayer
from .optimizers import AbsmaxOptimizer, AffineOptimizer, MaxOptimizer, Optimizer, SymmetricOptimizer, absmax_scale
from .qtype import act_spec, qtype, read_qtype, weight_spec

_M = TypeVar("_M", bound=type)

_MODULES: dict[type[nn.Module], type[QModuleMixin]] = {}
"""A module class -> what it becomes."""


def register_qmodule(module_cls: type[nn.Module]) -> Callable[[_M], _M]:
    """A class decorator: `quantize` makes modules of `module_cls` instances of the class, by its `qcreate`."""

    def register(cls: _M) -> _M:
        _MODULES[module_cls] = cast("type[QModuleMixin]", cls)
        return cls

    return register


def quantize_module(
    module: nn.Module,
    weights: qtype | str | None = None,
    activations: qtype | str | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module | None:
    """The quantized module over the parameters of `module`; None where there is none for it."""
    if isinstance(module, QModuleMixin):
        return None
    found = next((q for cls, q in _MODULES.items() if isinstance(module, cls)), None)
    return None if found is None else found.from_module(module, weights, activations, optimizer)


def group_size_of(kind: qtype | None, shape: torch.Size) -> int | None:
    """The elements that share a scale below 8 bits: the most of 128, 96, 64 and 32 that divide a row longer than 128; else
    None, the whole row."""
    row = shape[1:].numel()
    if kind is None or kind.bits == 8 or row <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if row % size == 0), None)


class _Round(torch.autograd.Function):
    """x -> rounded, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Output(Tensor):
    """What comes out of a module with activations: a plain tensor, of which `dequantize()` is itself, with its gradient, since
    code for quanto calls it. What is computed from it is of torch's own class."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dequantize(self) -> Tensor:
        """The tensor itself."""
        return self.as_subclass(Tensor)


class QModuleMixin:
    """What quantized modules have in common. It stands before the `nn.Module` among the bases of a class of one's own.

    weights, activations: qtypes or their names; None leaves them in floating point.
    optimizer: how scales of the weight are found; by default `AbsmaxOptimizer` for 8 bits, `MaxOptimizer` below.
    quantize_input: whether `activations` is about this module's input; by default as the class says.

    weight_qtype, activation_qtype, weight_group_size: what was chosen.
    input_scale, output_scale: buffers, what `Calibration` saw; 1 before.
    """

    weight: Any
    bias: Any
    input_scale: Tensor
    output_scale: Tensor
    takes_quantized_input: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        weights: qtype | str | None = None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        quantize_input: bool | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, nn.Module):
            raise TypeError(f"{type(self).__name__} must have a torch.nn.Module class among its bases")
        if type(self).__mro__.index(QModuleMixin) > type(self).__mro__.index(nn.Module):
            raise TypeError(f"QModuleMixin must come before torch.nn.Module among the bases of {type(self).__name__}")
        super().__init__(*args, device=device, **kwargs)  # type: ignore[call-arg]
        self.weight_qtype = read_qtype(weights, "weights")
        self.activation_qtype = read_qtype(activations, "activations")
        wanted_input = self.takes_quantized_input if quantize_input is None else quantize_input
        self.quantizes_input = wanted_input and self.activation_qtype is not None
        self.weight_group_size = None
        if self.weight_qtype is not None:
            self.weight_group_size = group_size_of(self.weight_qtype, self.weight.shape)
            weight_spec(self.weight_qtype, self.weight_group_size, self.weight.shape)
            usual = AbsmaxOptimizer() if self.weight_qtype.bits == 8 else MaxOptimizer()
            optimizer = usual if optimizer is None else optimizer
            wanted = SymmetricOptimizer if self.weight_qtype.bits == 8 else AffineOptimizer
            if isinstance(optimizer, (SymmetricOptimizer, AffineOptimizer)) and not isinstance(optimizer, wanted):
                raise ValueError(
                    f"optimizer must be a {wanted.__name__} for {self.weight_qtype.name}, got {optimizer!r}"
                )
        if self.activation_qtype is not None:
            act_spec(self.activation_qtype)
        self.optimizer = optimizer
        dtype = torch.float32 if self.weight is None else self.weight.dtype
        for name in ("input_scale", "output_scale"):
            self.register_buffer(name, torch.ones((), dtype=dtype, device=device))
        self.calibrated = False

    @classmethod
    def from_module(
        cls,
        module: Any,
        weights: qtype | str | None = None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
    ) -> Any:
        """The quantized module over the parameters of `module`; None where there is nothing to quantize."""
        made: Any = cls.qcreate(module, weights, activations, optimizer, device="meta")
        if made is None:
            return None
        device = torch.device("cpu") if module.weight is None else module.weight.device
        for name in ("input_scale", "output_scale"):
            setattr(made, name, torch.ones_like(getattr(made, name), device=device))
        for name, parameter in module._parameters.items():
            made._parameters[name] = parameter
        made.train(module.training)
        return made

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | str | None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        device: Any = None,
    ) -> Any:
        """A module like `module` without its parameters; None where there is nothing to quantize. A class defines it."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        """Whether the weight is stored quantized."""
        return isinstance(self.weight, QTensor)

    @property
    def spec(self) -> Spec | None:
        """How the weight is quantized; its `act` is that of the input."""
        if self.weight_qtype is None:
            return None
        spec = weight_spec(self.weight_qtype, self.weight_group_size, self.weight.shape)
        return dataclasses.replace(spec, act=self._act())

    def _act(self) -> Spec | None:
        assert self.activation_qtype is not None or not self.quantizes_input
        return act_spec(self.activation_qtype) if self.quantizes_input and self.calibrated else None  # type: ignore[arg-type]

    @property
    def qweight(self) -> QTensor | None:
        """The weight as it is or will be stored; None where it is not quantized."""
        if self.weight_qtype is None or self.frozen:
            return cast("QTensor | None", self.weight if self.weight_qtype is not None else None)
        spec = self.spec
        assert spec is not None
        with torch.no_grad():
            q = spec.quantize(self.weight.detach(), act_scale=self._act_scale(), **self._qparams(spec))
        q.qtype = self.weight_qtype  # type: ignore[attr-defined]
        return q

    def _act_scale(self) -> Tensor | None:
        return self.input_scale.float() if self._act() is not None else None

    def _qparams(self, spec: Spec) -> dict[str, Tensor]:
        weight = self.weight.detach()
        grid = spec.grid(weight.shape)
        assert self.weight_qtype is not None and self.optimizer is not None
        if self.weight_qtype.bits == 8:
            return {"scale": self.optimizer(weight, self.weight_qtype, 0).float().expand(grid).contiguous()}  # type: ignore[operator]
        rows = weight.reshape(weight.shape[0], -1)
        scale, shift = self.optimizer(rows, self.weight_qtype, 0, self.weight_group_size)  # type: ignore[operator]
        return affine_qparams(scale, shift, grid)

    def rounded_weight(self) -> Tensor:
        """The weight for a product: quantized if it is frozen, else what it will be, with the gradient of the float one."""
        if self.frozen or self.weight_qtype is None:
            return cast(Tensor, self.weight)
        qweight = self.qweight
        assert qweight is not None
        rounded: Tensor = _Round.apply(self.weight, qweight.dequantize())
        return rounded

    def rounded_input(self, input: Tensor) -> Tensor:
        """The input as the frozen module will see it."""
        act = self._act()
        return input if act is None else _Round.apply(input, _rounded(input.detach(), act, self.input_scale))

    def output(self, out: Tensor) -> Tensor:
        """What the module returns: `out`, which can be asked to `dequantize()` where there are activations."""
        plain = self.activation_qtype is None or torch.compiler.is_compiling()
        return out if plain else out.as_subclass(Output)

    def freeze(self) -> None:
        """Store the weight quantized."""
        if self.weight_qtype is not None and not self.frozen:
            self._install(cast(QTensor, self.qweight))

    def _install(self, q: QTensor) -> None:
        parameter = nn.Parameter(q, requires_grad=False)
        parameter.qtype = self.weight_qtype  # type: ignore[attr-defined]
        self._parameters["weight"] = parameter  # type: ignore[attr-defined]

    def observe(self, name: str, x: Tensor, momentum: float) -> None:
        """Take the range of an input or an output into "input_scale" or "output_scale"."""
        assert self.activation_qtype is not None
        x = x.detach().dequantize() if isinstance(x, QTensor) else x.detach()
        seen, known = absmax_scale(x, self.activation_qtype), getattr(self, name)
        setattr(self, name, (seen if (known == 1).all() else momentum * known + (1 - momentum) * seen).to(known.dtype))
        self.set_calibrated()

    def set_calibrated(self) -> None:
        """Quantize inputs from now on, by `input_scale`, if that was found."""
        self.calibrated = bool((self.input_scale != 1).all())
        if self.frozen and self.quantizes_input:
            fields = {k: t for k, t in self.weight.fields().items() if k != "act_scale"}
            made = self.spec.wrap({**fields}, self.weight.dtype, self.weight.shape, act_scale=self._act_scale())  # type: ignore[union-attr]
            self._install(made)

    # Names and forms of stored tensors are quanto's, so that its files can be read.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.frozen:
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
            return
        stored = stored_weight(self.weight, cast(qtype, self.weight_qtype))
        own = {"bias": self.bias, "input_scale": self.input_scale, "output_scale": self.output_scale}
        destination |= {f"{prefix}weight.{name}": t for name, t in stored.items()}
        destination |= {f"{prefix}{name}": t if keep_vars else t.detach() for name, t in own.items() if t is not None}

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        names = [key for key in state_dict if key.startswith(f"{prefix}weight.")]
        if self.weight_qtype is not None and names:
            stored = {key.removeprefix(f"{prefix}weight."): state_dict[key] for key in names}
            wanted = stored_names(self.weight_qtype)
            if stored.keys() >= wanted:
                device = torch.device("cpu") if self.weight.device.type == "meta" else self.weight.device
                self._install(self._read({name: t.to(device) for name, t in stored.items()}))
            missing.extend(f"{prefix}weight.{name}" for name in wanted - stored.keys())
            state_dict = {k: t for k, t in state_dict.items() if k not in names}
            state_dict[f"{prefix}weight"] = self.weight
            keep: list[str] = []
            frozen = self._parameters.pop("weight")  # type: ignore[attr-defined]
            super()._load_from_state_dict(state_dict, prefix, local_metadata, False, missing, keep, errors)  # type: ignore[misc]
            self._parameters["weight"] = frozen  # type: ignore[attr-defined]
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, False, missing, unexpected, errors)  # type: ignore[misc]
        self.set_calibrated()

    def _read(self, stored: dict[str, Tensor]) -> QTensor:
        assert self.weight_qtype is not None
        shape, self.calibrated = self.weight.shape, False
        spec = weight_spec(self.weight_qtype, self.weight_group_size, shape)
        grid, scale = spec.grid(shape), stored["_scale"]
        if self.weight_qtype.bits == 8:
            fields = {"qdata": stored["_data"], "scale": scale.float().expand(grid).contiguous()}
            return spec.wrap(fields, scale.dtype, shape)
        qparams = affine_qparams(scale, stored["_shift"], grid)
        codes = unpacked(stored["_data._data"], self.weight_qtype.bits).flatten()[: shape.numel()].reshape(shape)
        bits = cast(Intx, spec).bits
        qdata = codes if bits == 8 else pack(codes, bits, pack_dim(shape, bits, spec))
        return spec.wrap({"qdata": qdata, **qparams}, scale.dtype, shape)

    def extra_repr(self) -> str:
        """The layer, its qtypes, and whether it is frozen."""
        kinds = [f"{name}={kind and kind.name}" for name, kind in self._kinds().items()]
        return ", ".join([super().extra_repr(), *kinds, *(["frozen"] if self.frozen else [])])  # type: ignore[misc]

    def _kinds(self) -> dict[str, qtype | None]:
        return {"weights": self.weight_qtype, "activations": self.activation_qtype}


def affine_qparams(scale: Tensor, shift: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
    """The qparams of x = scale * code - shift; a shift of integers is a zero point. They are of the shape `grid`."""
    scale = scale.float()
    zero = shift.float() if not shift.is_floating_point() else torch.where(scale == 0, 0.0, shift.float() / scale)
    return {"scale": scale.reshape(grid), "zero_point": zero.reshape(grid)}


def _rounded(x: Tensor, act: Spec, scale: Tensor) -> Tensor:
    """`x` through the static activation `act`."""
    return act.round(x.float(), scale=scale.float().reshape([1] * x.dim()))


def stored_names(kind: qtype) -> set[str]:
    """The names of the tensors of a stored weight."""
    return {"_data", "_scale"} if kind.bits == 8 else {"_data._data", "_scale", "_shift"}


def stored_weight(q: Any, kind: qtype) -> dict[str, Tensor]:
    """The tensors that a frozen weight is stored as: codes, scales of the weight's dtype, and shifts below 8 bits."""
    scale = dense(q.scale)
    if "zero_point" not in q.fields():
        return {"_data": q.qdata.detach(), "_scale": scale.to(q.dtype).detach()}
    rows = -1, (q.numel() // scale.numel())
    shift = (scale * dense(q.zero_point)).reshape(-1, 1)
    packed = packed_rows(q.codes().reshape(rows), kind.bits)
    return {"_data._data": packed, "_scale": scale.reshape(-1, 1).to(q.dtype), "_shift": shift.to(q.dtype)}


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 4 bits, several rows to one of bytes: byte[i] = sum_j code[i + j * n] * 2**(j * bits), n rows of bytes."""
    per = 8 // bits
    n = -(-codes.shape[0] // per)
    rows = F.pad(codes, (0, 0, 0, n * per - codes.shape[0])).to(torch.uint8)
    out = torch.zeros_like(rows[:n])
    for j in range(per):
        out |= rows[j * n : (j + 1) * n] << (bits * j)
    return out


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes of `packed_rows`, padding included."""
    return torch.cat([(packed >> (bits * j)) & (2**bits - 1) for j in range(8 // bits)])


@register_qmodule(nn.Linear)
class QLinear(QModuleMixin, QuantizedLayer, nn.Linear):
    """`nn.Linear` over a weight that is, or will be, quantized."""

    takes_quantized_input = True

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | str | None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        device: Any = None,
    ) -> Any:
        """A module like `module` without its parameters."""
        return cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
        )

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K) -> (..., N)."""
        if isinstance(input, QTensor):
            input = input.dequantize()
        if self.frozen:
            return self.output(self.product(input))
        return self.output(F.linear(self.rounded_input(input), self.rounded_weight(), self.bias))


@register_qmodule(nn.Conv2d)
class QConv2d(QModuleMixin, nn.Conv2d):
    """`nn.Conv2d` over a weight that is, or will be, quantized. Its input stays as it is."""

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | str | None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        device: Any = None,
    ) -> Any:
        """A module like `module` without its parameters."""
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
        )

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, C, H, W)."""
        plain = input.dequantize() if isinstance(input, QTensor) else input
        return self.output(self._conv_forward(plain, self.rounded_weight(), self.bias))


@register_qmodule(nn.LayerNorm)
class QLayerNorm(QModuleMixin, nn.LayerNorm):
    """`nn.LayerNorm`, which stays as it is: what follows it quantizes its own input. It is there with `activations` only."""

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | str | None = None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        device: Any = None,
    ) -> Any:
        """A module like `module` without its parameters; None without activations."""
        if activations is None:
            return None
        return cls(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            module.bias is not None,
            dtype=None if module.weight is None else module.weight.dtype,
            device=device,
            activations=activations,
        )

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., *normalized_shape)."""
        return self.output(super().forward(input.dequantize() if isinstance(input, QTensor) else input))


__all__ = ["QConv2d", "QLayerNorm", "QLinear", "QModuleMixin", "quantize_module", "register_qmodule"]
