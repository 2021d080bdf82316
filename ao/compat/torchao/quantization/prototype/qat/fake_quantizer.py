"""torchao.quantization.prototype.qat.fake_quantizer."""

from ...qat.fake_quantizer import FakeQuantizer

__all__ = [
    "FakeQuantizer",
]
