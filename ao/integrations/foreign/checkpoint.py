"""A model folder that another library has quantized: which parameters its files hold, and each as a tensor of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model_folder import read_config, read_object
from ..stored_tensors import StoredTensors
from . import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, quanto, small_floats, torchao
from .reader import Reader, Source, reader_for

READERS = (awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, quanto, small_floats, torchao)
"""The modules that register readers."""


class ForeignCheckpoint:
    """The quantized parameters among the stored tensors of a folder.

    config: the `quantization_config`. names: of all stored tensors. metadata: of the files, all together.
    sources: full name of a parameter -> what is stored of it. ignored: stored names that are of no use to the model.
    """

    def __init__(
        self, config: Mapping[str, Any], names: Iterable[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.names = frozenset(names)
        self.reader: Reader = reader_for(config, metadata)
        self.sources: dict[str, Source] = {s.parameter: s for s in self.reader.sources(self.names)}
        if not self.sources:
            raise ValueError(
                f"the config says quant_method {config.get('quant_method')!r}, and the files hold no tensor of such a weight"
            )
        self.ignored = self.reader.ignored(self.names)

    @classmethod
    def of(cls, config: Mapping[str, Any], stored: StoredTensors) -> ForeignCheckpoint:
        """The quantized parameters in the files of a folder."""
        return cls(config, stored.names, {name: text for each in stored.metadata for name, text in each.items()})

    @property
    def parameters(self) -> list[str]:
        """The full names of the quantized parameters."""
        return list(self.sources)

    def stored_names(self, parameter: str) -> list[str]:
        """What is stored of a parameter."""
        return list(self.sources[parameter].parts.values())

    def make(
        self, parameter: str, get: Callable[[str], Tensor], dtype: torch.dtype, shape: torch.Size | None = None
    ) -> Tensor:
        """The parameter. get: what is stored under a name. Raises ValueError as `Reader.read` does."""
        return self.reader.read(self.sources[parameter], get, dtype, shape)

    @property
    def plain(self) -> frozenset[str]:
        """Stored names that are of no quantized parameter, and of use."""
        return self.names - {n for s in self.sources.values() for n in s.parts.values()} - self.ignored


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """How the model in `folder` is quantized, as its config.json or a file beside it says; None where nothing does.

    Raises ValueError for a file that is no JSON object.
    """
    config = read_config(folder)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            return dict(config[key])
    text = config.get("text_config") or {}
    if text.get("quantization_config"):
        return dict(text["quantization_config"])
    if (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt", **read_object(folder / "hf_quant_config.json")}
    if (folder / "quanto_qmap.json").is_file():
        return {"quant_method": "quanto", "modules": read_object(folder / "quanto_qmap.json")}
    return None
