"""Convert a folder that another library has quantized into one of ours, tensor by tensor: nothing is rounded anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from ...dtypes import QTensor
from ...quant import FqnToConfig, Report
from ...quant.report import Row
from ..command_line.safetensors_header import weight_files
from ..joined_parameters import joined_parameters
from ..model_folder import read_config, skeleton
from ..stored_tensors import StoredTensors
from ..target_folder import check_absent
from ..transformers import AoConfig
from ..written_folder import written_folder
from .checkpoint import ForeignCheckpoint, quantization_config

__all__ = ["convert_folder"]

_FOREIGN_FILES = ("hf_quant_config.json", "quanto_qmap.json", "quantize_config.json", "quant_config.json")
"""What says, beside config.json, how a folder was quantized."""


def convert_folder(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = 2 * 10**9,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Write `target`, a folder that `from_pretrained` loads, with the weights of `source` as quantized tensors of ours.

    source: a local folder with config.json and safetensors files, which GPTQ, AWQ, compressed-tensors, bitsandbytes, HQQ, quanto,
        ModelOpt or another library whose format is read has quantized. target: must not exist.
    max_shard_bytes: of a file; memory is needed for about twice as much, and for the largest layer.
    progress: called with the bytes of every stored tensor that is done.

    Returns a report of what each parameter is now. Raises FileNotFoundError and FileExistsError for wrong folders, and ValueError
    for a folder that is not quantized, for a format that is not read, for tensors that do not fit, and for experts that cannot be
    joined as they are stored. Nothing is left behind then.
    """
    data = read_config(source)
    check_absent(target)
    config = quantization_config(source)
    if config is None:
        raise ValueError(f"{source} is not quantized; use `ao quantize` (in Python, quantize_folder)")
    if config.get("quant_method") == "ao":
        raise ValueError(f"{source} is a folder of ao's already")
    report, table = Report(), dict[str, Any]()

    def count(nbytes: int) -> None:
        report.model_bytes += nbytes
        if progress is not None:
            progress(nbytes)

    stored = StoredTensors(weight_files(source), count)
    checkpoint = ForeignCheckpoint.of(config, stored)
    model = skeleton(source)
    made_of = joined_parameters(checkpoint.parameters, get_model_conversion_mapping(model), model)
    if lost := set(checkpoint.parameters).difference(*(joined.names for joined in made_of.values())):
        raise ValueError(f"{source}: the model has no parameter for {min(lost)!r}, which the files hold quantized")
    model.to(_dtype_of(model))
    with stored, written_folder(source, target, max_shard_bytes) as shards:
        for name, joined in made_of.items():
            read = report.model_bytes
            made = joined.make(name, model, checkpoint, stored.get)
            if isinstance(made, QTensor):
                before = report.model_bytes - read
                report.rows.append(Row(name, tuple(made.shape), repr(made.spec), before, made.nbytes))
                report.quantized_bytes += made.nbytes
                table[name] = made.spec
            shards.add(name, made)
        for name in sorted(checkpoint.plain):
            shards.add(name, stored.get(name))
        for name in _FOREIGN_FILES:
            (shards.folder / name).unlink(missing_ok=True)
        data.pop("compression_config", None)
        shards.write_config({**data, "quantization_config": AoConfig(FqnToConfig(table)).to_dict()})
    return report


def _dtype_of(model: Any) -> torch.dtype:
    """The dtype of the model's computation, as its config has it."""
    dtype = getattr(model.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
