"""Quantize a Hugging Face model folder into another one, shard by shard, so that the model need not fit in memory; or, for
recipes that run the model, in memory. The source is only read, and the target is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from ..dtypes.checkpoint import INDEX, SINGLE, flatten, writing
from ..quant import Config, Report, quantize_
from ..quant.report import storage_bytes
from .command_line.safetensors_header import read_header, weight_files
from .mapped_memory import MappedFiles
from .target_folder import check_absent, new_folder
from .transformers import AoConfig, AoHfQuantizer, mark_quantized, plain_linears
from .transformers_layers import all_jobs, embedding_names, rules_for
from .transformers_loading import quantize_named

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
    model = _checked(source, target)
    files = weight_files(source)
    settings = AoConfig(config, modules_to_not_convert=modules_to_not_convert, include_embedding=include_embedding)
    quantizer = AoHfQuantizer(settings, pre_quantized=False)
    quantizer.preprocess_model(model)
    plan, report = quantizer.plan, quantizer.report
    stored = {name for file in files for name in read_header(file)[1]}
    names = _names_of(model, stored)
    ties = getattr(model, "all_tied_weights_keys", {})
    found = set(names.values()) | {name for name, other in ties.items() if other in names.values()}
    if lost := [name for name in plan if name not in found]:
        raise ValueError(
            f"{source}: the checkpoint has no tensor {lost[0]!r}, because transformers renames or joins some of this model's "
            "as it loads them; use --in-memory (in Python, quantize_folder_in_memory)"
        )
    settings.modules_to_not_convert = plain_linears(model, plan)
    mapped = MappedFiles(map(str, files))
    with new_folder(target) as part:
        shards = Shards(part, max_shard_bytes)
        for name, t in _tensors(files):
            done = t.nbytes
            report.model_bytes += done
            if names[name] in plan:
                report.quantized_bytes += done
                q = quantize_named(plan[names[name]], names[name], t.to(device), report).map(lambda f: f.to("cpu"))
                if watch is not None:
                    watch(names[name], t, q)
                t = q
            shards.add(names[name] if isinstance(t, QTensor) else name, t)
            mapped.read(done)
            if progress is not None:
                progress(done)
        shards.finish()
        copy_others(source, part)
        data = json.loads((source / "config.json").read_text(encoding="utf-8"))
        data["quantization_config"] = settings.to_dict()
        (part / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
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
    from .model_folder import load_model

    blank = _checked(source, target)
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


def _checked(source: Path, target: Path) -> Any:
    """The model of a folder, without weights. Raises for folders that are not what they should be."""
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; give the folder of a Hugging Face model")
    check_absent(target)
    weight_files(source)
    model = skeleton(source)
    if model.config.to_dict().get("quantization_config"):
        raise ValueError(f"{source} is quantized already; give the folder of the model as it was trained")
    return model


def skeleton(source: Path) -> Any:
    """The model of a folder on the meta device: names and shapes, no weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if cls is None:
            return transformers.AutoModel.from_config(config)
        return cls(config)


def _names_of(model: nn.Module, stored: set[str]) -> dict[str, str]:
    """Stored name -> the model's own name for it. They differ where a model with a head loads the file of one without."""
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    prefix = getattr(model, "base_model_prefix", "")
    return {name: name if name in own or f"{prefix}.{name}" not in own else f"{prefix}.{name}" for name in stored}


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors, in the order in which they lie in the files, each mapped and read when it is used."""
    from safetensors import safe_open

    for path in files:
        order = sorted(read_header(path)[1].items(), key=lambda item: item[1].start)
        with safe_open(path, framework="pt") as file:
            for name, _ in order:
                yield name, file.get_tensor(name)


@dataclass
class Shards:
    """Safetensors files in `folder`, each of at most `limit` bytes or of one tensor. They get their names at the end."""

    folder: Path
    limit: int
    pending: dict[str, Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    total: int = 0
    written: list[list[str]] = field(default_factory=list)

    def add(self, name: str, t: Tensor) -> None:
        size = storage_bytes(t)
        if self.pending and self.pending_bytes + size > self.limit:
            self.flush()
        self.pending[name] = t
        self.pending_bytes += size

    def flush(self) -> None:
        from safetensors.torch import save_file

        leaves, metadata = flatten(self.pending)
        path = self.folder / f"part-{len(self.written) + 1:05}.safetensors"
        with writing(path):
            save_file({name: t.contiguous() for name, t in leaves.items()}, path, metadata=metadata)
        self.written.append(list(leaves))
        self.total += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        if self.pending or not self.written:
            self.flush()
        count = len(self.written)
        if count == 1:
            (self.folder / "part-00001.safetensors").rename(self.folder / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self.written, 1):
            file = f"model-{i:05}-of-{count:05}.safetensors"
            (self.folder / f"part-{i:05}.safetensors").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|npz|ot|gguf|onnx|onnx_data|onnx\.data|tflite|mlmodel|nemo)|.*\.index\.json"
    r"|openvino_.*\.xml"
)


def copy_others(source: Path, target: Path) -> None:
    """Everything of a model folder that is not the model's weights or its config.json: tokenizer, code, licence, sub-folders.

    Weights are told by their names, in any format. A sub-folder that has some is another form of the model (`onnx`,
    `openvino`, `original`), and left out whole; but what `modules.json` of sentence-transformers lists is part of the model
    (`2_Dense`), and copied whole. Hidden folders are left out. Links are followed.
    """
    parts: set[str] = set()
    if (source / "modules.json").is_file():
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        parts = {Path(module["path"]).parts[0] for module in listed if module["path"]}
    for path in source.iterdir():
        if path.is_dir():
            if not path.name.startswith(".") and (path.name in parts or not _has_weights(path)):
                shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
        elif path.name != "config.json" and not _WEIGHTS.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


def _has_weights(folder: Path) -> bool:
    return any(_WEIGHTS.fullmatch(name) for _, _, names in os.walk(folder) for name in names)
