"""torchao.quantization.qat.fake_quantizer: modules that round what passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ao import Intx, Spec
from ao.dtypes import dense
from ao.quant.qat import learned_fake_quantize

from ..granularity import PerTensor
from ..quant_primitives import (
    ZeroPointDomain,
    as_dtype,
    choose_qparams_affine,
    choose_qparams_affine_with_min_max,
    fake_quantize_affine,
)
from ..utils import get_block_size
from .fake_quantize_config import FakeQuantizeConfigBase, IntxFakeQuantizeConfig

__all__ = ["FakeQuantizer", "FakeQuantizerBase", "Float8FakeQuantizer", "IntxFakeQuantizer"]


class FakeQuantizerBase(nn.Module):
    """Rounds what passes as its config says, and gives its gradient as it is.

    enabled: False lets it pass.
    scale, zero_point: the qparams that are kept; None for ones that are found anew each time.
    """

    scale: Any
    zero_point: Any

    def __init__(self, config: FakeQuantizeConfigBase | Spec, activation: bool = False) -> None:
        super().__init__()
        self.config, self.activation, self.enabled = config, activation, True
        for name in ("scale", "zero_point"):
            self.register_buffer(name, None, persistent=False)

    @staticmethod
    def from_config(config: FakeQuantizeConfigBase) -> FakeQuantizerBase:
        """The module for a config."""
        return IntxFakeQuantizer(config)

    @property
    def spec(self) -> Spec:
        """The Spec that it rounds by."""
        if isinstance(self.config, Spec):
            return self.config
        spec = self.config.spec(self.activation)
        # A zero point is trained too, from 0 on.
        return replace(spec, symmetric=False) if self.config.range_learning and isinstance(spec, Intx) else spec

    @property
    def keeps(self) -> bool:
        """Whether its qparams are those of the first batch, or trained."""
        return isinstance(self.config, FakeQuantizeConfigBase) and not self.config.is_dynamic

    def initialize(self, x: Tensor) -> None:
        """Keep the qparams of `x`, as parameters if they are to be trained."""
        learns = isinstance(self.config, FakeQuantizeConfigBase) and self.config.range_learning
        wide = x.detach().float()
        spec = self.config if isinstance(self.config, Spec) else self.config.spec(self.activation)
        found = spec.choose_qparams(wide, spec.grid(wide.shape))
        if learns and isinstance(spec, Intx):
            found.setdefault("zero_point", torch.zeros_like(dense(found["scale"])))
        for name, t in found.items():
            value = dense(t).float()
            if learns:
                delattr(self, name)
                setattr(self, name, nn.Parameter(value))
            else:
                setattr(self, name, value)

    def rounded(self, x: Tensor) -> Tensor:
        """`x`, rounded by qparams of its own."""
        return self.spec.fake_quantize(x)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, rounded."""
        if not self.enabled:
            return x
        if not self.keeps:
            return self.rounded(x)
        if self.scale is None:
            if self.config.range_learning:  # type: ignore[union-attr]
                raise ValueError(
                    "the scales that are to be trained are not there yet; call initialize_fake_quantizers(model, "
                    "example_inputs) before the optimizer is made"
                )
            self.initialize(x)
        return learned_fake_quantize(x, self.spec, self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """The config."""
        return str(self.config)


class IntxFakeQuantizer(FakeQuantizerBase):
    """Rounds to integers, by the formulas of `quant_primitives`.

    One of a config with PerTensor() keeps the qparams of a range that it is told, or has seen:

        quantizer.enable_calibration()          # from here on everything passes, and its range is recorded
        ...                                     # call the model
        quantizer.finalize_calibration()        # from here on it rounds by that range
    """

    _range: tuple[Tensor, Tensor] | None = None
    _calibrating = False

    def enable_calibration(self) -> None:
        """Let everything pass, and record its range anew."""
        self._calibrating, self._range = True, None

    def get_running_min_max(self) -> tuple[Tensor, Tensor]:
        """The range that was seen. Raises ValueError if nothing was."""
        if self._range is None:
            raise ValueError("there is no range yet; call enable_calibration(), and then the model with data")
        return self._range

    def set_running_min_max(self, min_val: Tensor, max_val: Tensor) -> None:
        """Take another range, such as that of all ranks."""
        self._range = min_val, max_val

    def finalize_calibration(self) -> None:
        """Round by the range from here on."""
        low, high = self.get_running_min_max()
        config: Any = self.config
        self.scale, self.zero_point = choose_qparams_affine_with_min_max(
            low, high, config.mapping_type, (), as_dtype(config.dtype), None, None, config.eps, config.scale_precision,
            config.zero_point_precision,
        )  # fmt: skip
        self._calibrating = False

    def _see(self, x: Tensor) -> None:
        low, high = x.detach().aminmax()
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def forward(self, x: Tensor) -> Tensor:
        """`x`, rounded."""
        if self._calibrating:
            self._see(x)
            return x
        config = self.config
        if not self.enabled or not isinstance(config, IntxFakeQuantizeConfig) or config.granularity != PerTensor():
            return super().forward(x)
        if self.scale is None:  # the first batch is all there is to go by
            self._see(x)
            self.finalize_calibration()
        return fake_quantize_affine(x, x.shape, self.scale, self.zero_point, as_dtype(config.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        """`x`, rounded by qparams of its own."""
        config = self.config
        if not isinstance(config, IntxFakeQuantizeConfig):
            return super().rounded(x)
        block, dtype = get_block_size(x.shape, config.granularity), as_dtype(config.dtype)
        domain = config.zero_point_domain
        floating = domain is ZeroPointDomain.FLOAT
        scale, zero = choose_qparams_affine(
            x.detach(), config.mapping_type, block, dtype, None, None, config.eps, config.scale_precision,
            config.zero_point_precision, not floating, domain,
        )  # fmt: skip
        return fake_quantize_affine(x, block, scale, zero, dtype, None, None, domain)


class Float8FakeQuantizer(FakeQuantizerBase):
    """Rounds to float8."""


FakeQuantizer = IntxFakeQuantizer
