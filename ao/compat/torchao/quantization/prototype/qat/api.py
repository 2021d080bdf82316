"""torchao.quantization.prototype.qat.api."""

from ...qat.api import ComposableQATQuantizer, FakeQuantizeConfig

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizeConfig",
]
