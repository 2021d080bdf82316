"""torchao.prototype.gptq.api."""

from . import GPTQConfig

__all__ = ["GPTQConfig"]
