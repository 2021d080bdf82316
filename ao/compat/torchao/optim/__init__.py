"""torchao.optim: optimizers with states of 4 to 8 bits. `_AdamW` is `ao.optim.AdamW`, whose states are float32."""

from ao.optim import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8, CPUOffloadOptimizer
from ao.optim import AdamW as _AdamW

__all__ = [
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "CPUOffloadOptimizer",
    "_AdamW",
]
