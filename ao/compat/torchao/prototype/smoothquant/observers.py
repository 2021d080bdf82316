"""Observers of one layer's input: they find SmoothQuant's factor, max|x|**alpha / max|w|**(1 - alpha) per input channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

QParams = tuple[Tensor, Tensor | None, Tensor | None]
"""The factor, (K,); scale and zero point of what is left of the input, one each, or None."""


class _Observer(nn.Module):
    def __init__(self, weight: Tensor, alpha: float | None = 0.5) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"{type(self).__name__}: weight must have 2 dims, got {tuple(weight.shape)}")
        self.weight, self.alpha = weight, alpha

    def _factor(self, largest: Tensor) -> Tensor:
        if self.alpha is None:
            return torch.ones_like(largest)
        tiny = torch.finfo(torch.float32).eps
        return (largest + tiny) ** self.alpha / (self.weight.detach().abs().amax(0) + tiny) ** (1 - self.alpha)

    def _seen(self, seen: bool) -> None:
        # AssertionError, since callers of torchao's observers catch that.
        if not seen:
            raise AssertionError(f"{type(self).__name__} has seen no data; call the model with some first")


class SmoothQuantObserver(_Observer):
    """Keeps all inputs. weight: (N, K). alpha: how much of the spread moves to the weight; None for none of it."""

    def __init__(self, weight: Tensor, alpha: float | None = 0.5) -> None:
        super().__init__(weight, alpha)
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input`, (..., K), as it is."""
        self.inputs.append(input.cpu())
        return input

    def calculate_qparams(self, weight_quant_kwargs: Any = None) -> QParams:
        """The factor, and with `weight_quant_kwargs` the qparams of the inputs divided by it. See `range_qparams`."""
        self._seen(bool(self.inputs))
        x = torch.cat([t.flatten(0, -2) for t in self.inputs]).to(self.weight.device)
        factor = self._factor(x.abs().amax(0))
        if weight_quant_kwargs is None:
            return factor, None, None
        smooth = x / factor
        return (factor, *range_qparams(smooth.min(), smooth.max(), weight_quant_kwargs))


class RunningAbsMaxSmoothQuantObserver(_Observer):
    """Keeps a number per channel. For qparams it sees the data twice, with `compute_smoothing_factor` in between.

    weight: (N, K). alpha: as in `SmoothQuantObserver`.
    """

    def __init__(self, weight: Tensor, alpha: float | None = 0.5) -> None:
        super().__init__(weight, alpha)
        self.x_abs_max: Tensor | None = None
        self.calibration_count = 0
        self._smoothing_factor: Tensor | None = None
        self._second_pass_count = 0
        self._smooth_input_min: Tensor | None = None
        self._smooth_input_max: Tensor | None = None

    @property
    def _in_second_pass(self) -> bool:
        return self._smoothing_factor is not None

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """`input`, (..., K), as it is."""
        x = input.flatten(0, -2)
        if self._smoothing_factor is None:
            largest = x.abs().amax(0)
            self.x_abs_max = largest if self.x_abs_max is None else torch.maximum(self.x_abs_max, largest)
            self.calibration_count += 1
            return input
        low, high = (x / self._smoothing_factor).aminmax()
        self._smooth_input_min = low if self._smooth_input_min is None else torch.minimum(self._smooth_input_min, low)
        self._smooth_input_max = high if self._smooth_input_max is None else torch.maximum(self._smooth_input_max, high)
        self._second_pass_count += 1
        return input

    def compute_smoothing_factor(self) -> Tensor:
        """The factor, (K,). From here on inputs are divided by it, and their range is kept."""
        self._seen(self.x_abs_max is not None)
        assert self.x_abs_max is not None
        self._smoothing_factor = self._factor(self.x_abs_max)
        self._second_pass_count, self._smooth_input_min, self._smooth_input_max = 0, None, None
        return self._smoothing_factor

    def calculate_qparams(self, weight_quant_kwargs: Any = None) -> QParams:
        """The factor, and with `weight_quant_kwargs`, where there was a second pass, qparams. See `range_qparams`."""
        self._seen(self.x_abs_max is not None)
        assert self.x_abs_max is not None
        factor = self._factor(self.x_abs_max) if self._smoothing_factor is None else self._smoothing_factor
        low, high = self._smooth_input_min, self._smooth_input_max
        if weight_quant_kwargs is None or low is None or high is None:
            return factor, None, None
        return (factor, *range_qparams(low, high, weight_quant_kwargs))


def range_qparams(low: Tensor, high: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Scale and zero point of integers that hold all of low to high, and 0.

    kwargs: a mapping, or an object, with quant_min (-128), quant_max (127) and is_symmetric (True).
    """

    def setting(name: str, default: Any) -> Any:
        return kwargs.get(name, default) if isinstance(kwargs, Mapping) else getattr(kwargs, name, default)

    least, most = setting("quant_min", -128), setting("quant_max", 127)
    tiny = torch.finfo(torch.float32).eps
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    if setting("is_symmetric", True):
        scale = (torch.maximum(-low, high) / ((most - least) / 2)).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (most - least)).clamp(min=tiny)
    return scale, (least - (low / scale).round()).clamp(least, most).int()
