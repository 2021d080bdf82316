"""torchao.quantization.prototype: where `qat` was before."""
