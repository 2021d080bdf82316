"""The formats that the benchmarks know by name: those of the command line, and the dtypes that are not quantized."""

from __future__ import annotations

import torch

from ao.integrations.command_line.format_names import FORMATS, config_of, help_text

PLAIN = {"bf16": torch.bfloat16, "float32": torch.float32}
"""Names of what is not quantized."""

__all__ = ["FORMATS", "PLAIN", "config_of", "help_text"]
