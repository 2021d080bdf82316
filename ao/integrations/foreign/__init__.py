"""Checkpoints of other libraries as quantized tensors of ours, bit for bit: nothing is rounded anew."""
