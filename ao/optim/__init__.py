"""Optimizers with states of 4 to 8 bits: drop-ins for torch.optim."""

import importlib
from typing import TYPE_CHECKING, Any

from .adam import Adam4bit, Adam8bit, AdamFp8, AdamW, AdamW4bit, AdamW8bit, AdamWFp8
from .lion import Lion8bit
from .optimizer import LowBitOptimizer
from .sgd import SGD8bit
from .stochastic_rounding import stochastic_round

if TYPE_CHECKING:
    from .adagrad import Adagrad8bit
    from .ademamix import AdEMAMix8bit
    from .checkpoint import load_state_dict, save_state_dict
    from .lamb import LAMB8bit
    from .lars import LARS8bit
    from .offload import CPUOffloadOptimizer
    from .rmsprop import RMSprop8bit
else:
    _LATER = {
        "AdEMAMix8bit": "ademamix",
        "Adagrad8bit": "adagrad",
        "CPUOffloadOptimizer": "offload",
        "LAMB8bit": "lamb",
        "LARS8bit": "lars",
        "RMSprop8bit": "rmsprop",
        "load_state_dict": "checkpoint",
        "save_state_dict": "checkpoint",
    }

    def __getattr__(name: str) -> Any:
        """The names whose modules are imported when they are asked for."""
        if name in _LATER:
            return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AdEMAMix8bit",
    "Adagrad8bit",
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "CPUOffloadOptimizer",
    "LAMB8bit",
    "LARS8bit",
    "Lion8bit",
    "LowBitOptimizer",
    "RMSprop8bit",
    "SGD8bit",
    "load_state_dict",
    "save_state_dict",
    "stochastic_round",
]
