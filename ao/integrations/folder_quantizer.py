"""Quantize a Hugging Face model folder into another one, shard by shard, so that the model need not fit in memory; or, for
recipes that run the model, in memory. The source is only read, and the target is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from ..quant import Config, Report, quantize_
from .command_line.safetensors_header import weight_files
from .mapped_memory import MappedFiles
from .model_folder import load_model, read_config, skeleton
from .stored_tensors import StoredTensors
from .target_folder import check_absent, new_folder
from .transformers import AoConfig, AoHfQuantizer, mark_quantized, plain_linears
from .transformers_layers import all_jobs, embedding_names, rules_for
from .transformers_loading import quantize_named
from .written_folder import copy_others, written_folder

__all__ = ["quantize_folder", "quantize_folder_in_memory"]

Watch = Callable[[str, Tensor, QTensor], None]


def quantize_folder(
    source: Path,
    target: Path,
    config: Config | Spec | str,
    *,
    modules_to_not_convert: list[str] | None = None,
    include_embedding: bool = False,
    max_shard_bytes: int = 2 * 10**9,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Write `target`, a folder that `from_pretrained` loads, with the weights of `source` quantized, one tensor at a time.

    source: a local folder with config.json and safetensors files. target: must not exist.
    config, modules_to_not_convert, include_embedding: as in `AoConfig`; a recipe that needs no data ("hqq") is followed.
    max_shard_bytes: of a file; memory is needed for about twice as much, and for the largest layer.
    device: where to quantize.
    watch: called with every parameter that is quantized, as it was and as it is.
    progress: called with the bytes of every tensor that is done.

    Raises FileNotFoundError and FileExistsError for wrong folders, and ValueError for a model whose tensors transformers
    renames or joins as it loads them, and for what `quantize_` refuses. Nothing is left behind then.
    """
    model, data = _checked(source, target)
    stored = StoredTensors(weight_files(source))
    settings = AoConfig(config, modules_to_not_convert=modules_to_not_convert, include_embedding=include_embedding)
    quantizer = AoHfQuantizer(settings, pre_quantized=False)
    quantizer.preprocess_model(model)
    plan, report = quantizer.plan, quantizer.report
    names = _names_of(model, stored.names)
    ties = getattr(model, "all_tied_weights_keys", {})
    found = set(names.values()) | {name for name, other in ties.items() if other in names.values()}
    if lost := [name for name in plan if name not in found]:
        raise ValueError(
            f"{source}: the checkpoint has no tensor {lost[0]!r}, because transformers renames or joins some of this model's "
            "as it loads them; use --in-memory (in Python, quantize_folder_in_memory)"
        )
    settings.modules_to_not_convert = plain_linears(model, plan)
    mapped = MappedFiles(map(str, stored.files), kept=False)
    with stored, written_folder(source, target, max_shard_bytes) as shards:
        for name, read in stored.in_order():
            t, done = read, read.nbytes
            report.model_bytes += done
            if names[name] in plan:
                q = quantize_named(plan[names[name]], names[name], t.to(device), report).map(lambda f: f.to("cpu"))
                if watch is not None:
                    watch(names[name], t, q)
                t = q
                report.quantized_bytes += done
            shards.add(names[name] if isinstance(t, QTensor) else name, t)
            mapped.read(read)
            if progress is not None:
                progress(done)
        shards.write_config({**data, "quantization_config": settings.to_dict()})
    return report


def quantize_folder_in_memory(
    source: Path,
    target: Path,
    config: Config | Spec | str,
    *,
    calibration_data: Sequence[Any] | None = None,
    modules_to_not_convert: list[str] | None = None,
    include_embedding: bool = False,
    max_shard_bytes: int = 2 * 10**9,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Report:
    """`quantize_folder` for recipes that calibrate, and for models whose tensors transformers renames or joins.

    The model is loaded as it is, and stays in main memory; with a `device`, one block at a time is there. Raises
    ValueError for a recipe without the data that it needs.

    calibration_data: batches to run the model on, as in `quantize_`.
    """
    blank, _ = _checked(source, target)
    settings = AoConfig(config, modules_to_not_convert=modules_to_not_convert, include_embedding=include_embedding)
    keep = AoHfQuantizer(settings, pre_quantized=False).kept(blank)
    ends = embedding_names(blank)
    planned, passed = all_jobs(blank, settings, keep, ends)
    rules = rules_for(blank, settings, keep, ends)
    if calibration_data is None and any(job.needs for job in planned.values()):
        raise ValueError("the recipe, or a static activation, needs calibration_data, and there is none")
    model = load_model(source)
    before = {name: model.get_parameter(name).detach() for name in planned} if watch is not None else {}
    report = quantize_(model, rules, device=device, calibration_data=calibration_data)
    report.skipped = passed.skipped
    for row in report.rows:
        if watch is not None:
            watch(row.name, before.pop(row.name), model.get_parameter(row.name).detach().to("cpu"))
    mark_quantized(model, settings)
    with new_folder(target) as part:
        model.save_pretrained(part, max_shard_size=max_shard_bytes)
        copy_others(source, part)
    return report


def _checked(source: Path, target: Path) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, without weights, and its config. Raises for folders that are not what they should be."""
    config = read_config(source)
    check_absent(target)
    weight_files(source)
    model = skeleton(source)
    if model.config.to_dict().get("quantization_config"):
        raise ValueError(f"{source} is quantized already; give the folder of the model as it was trained")
    return model, config


def _names_of(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> the model's own name for it. They differ where a model with a head loads the file of one without."""
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    prefix = getattr(model, "base_model_prefix", "")
    return {name: name if name in own or f"{prefix}.{name}" not in own else f"{prefix}.{name}" for name in stored}
