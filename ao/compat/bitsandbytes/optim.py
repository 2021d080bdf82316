"""bitsandbytes' optimizers over those of `ao.optim`.

A name without a number has states of `optim_bits`, 32 by default; 8bit and 32bit say it. "Paged" ones keep their states on the
device of the parameters: ao has none that move by themselves, and `ao.optim.CPUOffloadOptimizer` for states in host memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ... import optim as _optim
from ...dtypes import Spec

_BITS = "optim_bits"
_GROUPED = ("lr", "betas", "eps", "weight_decay", "momentum")
_ACCEPTED = ("is_sparse", "min_8bit_size", "percentile_clipping", "block_wise", "max_unorm")


class GlobalOptimManager:
    """Settings of single parameters: `GlobalOptimManager.get_instance().override_config(embedding.weight, "optim_bits", 32)`.

    "optim_bits" holds for states that are made later; "lr", "betas", "eps", "weight_decay" and "momentum" from the next step on,
    in a param group of their own. The other settings of bitsandbytes are accepted and have no effect on a single parameter.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None

    def __init__(self) -> None:
        self._known: list[tuple[Callable[[], Any], dict[str, Any]]] = []

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def register_parameters(self, params: Any) -> None:
        """Accepted: parameters need not be known beforehand."""

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Settings of `module.param_name`, which may be another parameter by the time an optimizer is made."""
        reference = weakref.ref(module)
        self._known.append((lambda: getattr(reference(), param_name, None), _checked(config)))

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Settings of parameters. Raises NotImplementedError for one that is not known."""
        config = _checked({**(key_value_dict or {}), **({} if key is None else {key: value})})
        for p in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._known.append((weakref.ref(p), config))

    def settings_of(self, parameter: Tensor) -> dict[str, Any]:
        """The settings of a parameter, the last ones before the others."""
        found: dict[str, Any] = {}
        for known, config in self._known:
            if known() is parameter:
                found |= config
        return found

    def keeps_32_bits(self, parameter: Tensor) -> bool:
        """Whether the states of a parameter stay in 32 bits."""
        return self.settings_of(parameter).get(_BITS) == 32


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = config.keys() - {_BITS, *_GROUPED, *_ACCEPTED}
    if unknown or config.get(_BITS, 8) not in (8, 32):
        raise NotImplementedError(
            f"GlobalOptimManager takes optim_bits=8 or 32, {', '.join(_GROUPED)} for single parameters, got {dict(config)}"
        )
    return dict(config)


_OWN = ("block_size", "bf16_stochastic_round", "maximize", "full_precision", "compile")


class _Sized(_optim.LowBitOptimizer):
    """States of 8 or 32 bits, and 32 for small parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._overridden: dict[int, dict[str, Any]] = {}
        self._norms: dict[int, deque[float]] = {}
        self.register_step_pre_hook(_before_step)

    def override(self) -> None:
        """Give each parameter that the manager has settings for a param group with them, if it is not there yet."""
        manager = GlobalOptimManager.get_instance()
        for group in list(self.param_groups):
            for p in list(group["params"]):
                wanted = {k: v for k, v in manager.settings_of(p).items() if k in group and k in _GROUPED}
                if wanted and self._overridden.get(id(p)) != wanted:
                    self._overridden[id(p)] = wanted
                    full = [group["params"][i] for i in group["full_precision"]]
                    group["params"] = [q for q in group["params"] if q is not p]
                    group["full_precision"] = [
                        i for i, q in enumerate(group["params"]) if any(q is other for other in full)
                    ]
                    mine = [p] if any(p is other for other in full) else []
                    self.add_param_group({**group, **wanted, "params": [p], "full_precision": mine})

    def clip(self) -> None:
        """Shrink each gradient to the percentile `percentile_clipping` of its last 100 norms."""
        for p in [p for group in self.param_groups for p in group["params"] if p.grad is not None]:
            norms = self._norms.setdefault(id(p), deque(maxlen=100))
            norm = float(p.grad.norm())
            norms.append(norm)
            most = sorted(norms)[min(len(norms) - 1, len(norms) * self.percentile_clipping // 100)]
            if norm > most:
                p.grad.mul_(most / norm)

    def _size(self, bits: int, min_8bit_size: int, old: Mapping[str, Any]) -> dict[str, Any]:
        """Take the settings about size, refuse what is not here, and return the parameters of ao among the others."""
        who = type(self).__name__
        if bits not in (8, 32):
            raise NotImplementedError(f"{who}: optim_bits must be 8 or 32, got {bits}; ao.optim has 4 bits too")
        self.percentile_clipping = old.get("percentile_clipping", 100)
        if not 0 < self.percentile_clipping <= 100:
            raise ValueError(
                f"{who}: percentile_clipping must be above 0 and at most 100, got {self.percentile_clipping}"
            )
        if not old.get("block_wise", True):
            raise NotImplementedError(f"{who}: block_wise must be True: states of ao have a scale per 256 elements")
        unknown = old.keys() - {"percentile_clipping", "block_wise", *_OWN}
        if unknown:
            raise TypeError(f"{who} has no parameter {sorted(unknown)}")
        self.optim_bits, self.min_8bit_size = bits, min_8bit_size
        return {name: old[name] for name in _OWN if name in old}

    def specs(self, group: dict[str, Any], index: int) -> tuple[tuple[str, Spec | None], ...]:
        """The states of the group's parameter `index`, each with the Spec of its rows or None for float32."""
        p = group["params"][index]
        small = p.numel() < self.min_8bit_size
        full = self.optim_bits == 32 or small or GlobalOptimManager.get_instance().keeps_32_bits(p)
        return tuple((name, None if full else spec) for name, spec in super().specs(group, index))


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.override()
    if optimizer.percentile_clipping < 100:
        optimizer.clip()


class Adam(_Sized, _optim.Adam8bit):
    """Adam. Weight decay is decoupled, as in AdamW.

    optim_bits: of the states, 8 or 32. min_8bit_size: smaller parameters have states of 32 bits, as have those below 4096
    elements in any case. is_paged, args: accepted. percentile_clipping: shrink a gradient to this percentile of its
    last 100 norms; norms are not saved. block_wise: True, the only one. Those of `ao.optim.Adam8bit` are taken too.
    """

    decoupled = True
    bits: ClassVar[int | None] = None
    decay: ClassVar[float] = 0.0

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        is_paged: bool = False,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        weight_decay = self.decay if weight_decay is None else weight_decay
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **own)


class AdamW(Adam):
    """`Adam` whose weight_decay is 0.01 by default."""

    decay = 1e-2


class Lion(_Sized, _optim.Lion8bit):
    """Lion. The parameters are those of `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        is_paged: bool = False,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, betas, weight_decay, **own)


class SGD(_Sized, _optim.SGD8bit):
    """SGD with momentum. The parameters are those of `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **own)


class RMSprop(_Sized, _optim.RMSprop8bit):
    """RMSprop. momentum counts, as in torch.optim. centered: False. The other parameters are those of `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **old: Any,
    ) -> None:
        who = type(self).__name__
        if alpha == 0:
            raise NotImplementedError(f"{who}: alpha must be above 0, got 0")
        if centered:
            raise NotImplementedError(f"{who} has no centered=True; use torch.optim.RMSprop for it")
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, **own)


class Adagrad(_Sized, _optim.Adagrad8bit):
    """Adagrad. lr_decay and initial_accumulator_value count, as in torch.optim. The other parameters are those of `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, **own)


class LAMB(_Sized, _optim.LAMB8bit):
    """LAMB. max_unorm holds for states of 8 bits as well. amsgrad, adam_w_mode: accepted; the weight decay is decoupled.

    The other parameters are those of `Adam`.
    """

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        max_unorm: float = 1.0,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, bias_correction, betas, eps, weight_decay, max_unorm, **own)


class LARS(_Sized, _optim.LARS8bit):
    """LARS. max_unorm holds for states of 8 bits as well. The other parameters are those of `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        max_unorm: float = 0.02,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        if momentum == 0:
            raise NotImplementedError(f"{type(self).__name__}: momentum must be above 0; PytorchLARS goes without")
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, max_unorm, **own)


class PytorchLARS(_optim.LARS8bit):
    """LARS with float32 states, without momentum too."""

    formats = {}

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
        **own: Any,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, max_unorm, **own)


class AdEMAMix(_Sized, _optim.AdEMAMix8bit):
    """AdEMAMix. The parameters are those of `ao.optim.AdEMAMix8bit` and `Adam`."""

    bits: ClassVar[int | None] = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **old: Any,
    ) -> None:
        own = self._size(optim_bits if self.bits is None else self.bits, min_8bit_size, old)
        super().__init__(params, lr, betas, alpha, t_alpha or None, t_beta3 or None, eps, weight_decay, **own)


class Adam8bit(Adam):
    """`Adam` with 8-bit states."""

    bits = 8


class Adam32bit(Adam):
    """`Adam` with 32-bit states."""

    bits = 32


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit states."""

    bits = 8


class AdamW32bit(AdamW):
    """`AdamW` with 32-bit states."""

    bits = 32


class Lion8bit(Lion):
    """`Lion` with an 8-bit state."""

    bits = 8


class Lion32bit(Lion):
    """`Lion` with a 32-bit state."""

    bits = 32


class SGD8bit(SGD):
    """`SGD` with an 8-bit state."""

    bits = 8


class SGD32bit(SGD):
    """`SGD` with a 32-bit state."""

    bits = 32


class RMSprop8bit(RMSprop):
    """`RMSprop` with 8-bit states."""

    bits = 8


class RMSprop32bit(RMSprop):
    """`RMSprop` with 32-bit states."""

    bits = 32


class Adagrad8bit(Adagrad):
    """`Adagrad` with an 8-bit state."""

    bits = 8


class Adagrad32bit(Adagrad):
    """`Adagrad` with a 32-bit state."""

    bits = 32


class LAMB8bit(LAMB):
    """`LAMB` with 8-bit states."""

    bits = 8


class LAMB32bit(LAMB):
    """`LAMB` with 32-bit states."""

    bits = 32


class LARS8bit(LARS):
    """`LARS` with an 8-bit state."""

    bits = 8


class LARS32bit(LARS):
    """`LARS` with a 32-bit state."""

    bits = 32


class AdEMAMix8bit(AdEMAMix):
    """`AdEMAMix` with 8-bit states."""

    bits = 8


class AdEMAMix32bit(AdEMAMix):
    """`AdEMAMix` with 32-bit states."""

    bits = 32


PagedAdam, PagedAdam8bit, PagedAdam32bit = Adam, Adam8bit, Adam32bit
PagedAdamW, PagedAdamW8bit, PagedAdamW32bit = AdamW, AdamW8bit, AdamW32bit
PagedLion, PagedLion8bit, PagedLion32bit = Lion, Lion8bit, Lion32bit
PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit = AdEMAMix, AdEMAMix8bit, AdEMAMix32bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PytorchLARS",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
]
