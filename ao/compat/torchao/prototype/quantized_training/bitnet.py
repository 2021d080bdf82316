"""torchao.prototype.quantized_training.bitnet."""

from . import BitNetTrainingLinearWeight, bitnet_training, precompute_bitnet_scale_for_fsdp

__all__ = ["BitNetTrainingLinearWeight", "bitnet_training", "precompute_bitnet_scale_for_fsdp"]
