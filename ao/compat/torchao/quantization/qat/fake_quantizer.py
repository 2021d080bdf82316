"""torchao.quantization.qat.fake_quantizer: modules that round what passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ao import Spec
from ao.dtypes import dense
from ao.quant.qat import learned_fake_quantize

from .fake_quantize_config import FakeQuantizeConfigBase

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
        return self.config if isinstance(self.config, Spec) else self.config.spec(self.activation)

    @property
    def keeps(self) -> bool:
        """Whether its qparams are those of the first batch, or trained."""
        return isinstance(self.config, FakeQuantizeConfigBase) and not self.config.is_dynamic

    def initialize(self, x: Tensor) -> None:
        """Keep the qparams of `x`, as parameters if they are to be trained."""
        learns = isinstance(self.config, FakeQuantizeConfigBase) and self.config.range_learning
        wide = x.detach().float()
        for name, t in self.spec.choose_qparams(wide, self.spec.grid(wide.shape)).items():
            value = dense(t).float()
            if learns:
                delattr(self, name)
                setattr(self, name, nn.Parameter(value))
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, rounded."""
        if not self.enabled:
            return x
        if not self.keeps:
            return self.spec.fake_quantize(x)
        if self.scale is None:
            self.initialize(x)
        return learned_fake_quantize(x, self.spec, self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """The config."""
        return str(self.config)


class IntxFakeQuantizer(FakeQuantizerBase):
    """Rounds to integers."""


class Float8FakeQuantizer(FakeQuantizerBase):
    """Rounds to float8."""


FakeQuantizer = IntxFakeQuantizer
