"""torchao.float8.inference."""

from ..quantization.mm_config import Float8MMConfig

__all__ = ["Float8MMConfig"]
