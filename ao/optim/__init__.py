"""Optimizers with states of 4 to 8 bits: drop-ins for torch.optim."""

from .adam import Adam4bit, Adam8bit, AdamFp8, AdamW, AdamW4bit, AdamW8bit, AdamWFp8
from .checkpoint import load_state_dict, save_state_dict
from .lion import Lion8bit
from .offload import CPUOffloadOptimizer
from .optimizer import LowBitOptimizer
from .sgd import SGD8bit
from .stochastic_rounding import stochastic_round

__all__ = [
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "CPUOffloadOptimizer",
    "Lion8bit",
    "LowBitOptimizer",
    "SGD8bit",
    "load_state_dict",
    "save_state_dict",
    "stochastic_round",
]
