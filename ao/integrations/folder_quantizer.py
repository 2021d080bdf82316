"""Quantize a Hugging Face model folder into another one, shard by shard, so that the model need not fit in memory.

The target is made in a folder of its own beside it and renamed at the end: it is there whole or not at all. What a killed
run leaves behind, `.<name>.<32 hex digits>.tmp`, the next run that succeeds removes. The source is only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from ..dtypes.checkpoint import INDEX, SINGLE, flatten
from ..quant import Config, Report
from ..quant.report import Row, storage_bytes
from .command_line.safetensors_header import read_header, weight_files
from .transformers import AoConfig, AoHfQuantizer

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
    """Write `target`, a folder that `from_pretrained` loads, with the weights of `source` quantized by round-to-nearest.

    source: a local folder with config.json and safetensors files. target: must not exist.
    config, modules_to_not_convert, include_embedding: as in `AoConfig`.
    max_shard_bytes: of a file; memory is needed for about twice as much, and for the largest layer.
    device: where to quantize.
    watch: called with every parameter that is quantized, as it was and as it is.
    progress: called with the bytes of every tensor that is done.

    Raises FileNotFoundError and FileExistsError for wrong folders, and ValueError for a model whose tensors transformers
    renames or joins as it loads them, and for what `quantize_` refuses. Nothing is left behind then.
    """
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; give the folder of a Hugging Face model")
    if target.exists():
        raise FileExistsError(f"{target} exists already; give a folder that does not, or remove it")
    files = weight_files(source)
    settings = AoConfig(config, modules_to_not_convert=modules_to_not_convert, include_embedding=include_embedding)
    model = skeleton(source)
    if model.config.to_dict().get("quantization_config"):
        raise ValueError(f"{source} is quantized already; give the folder of the model as it was trained")
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
            "as it loads them; use --in-memory"
        )
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    part = parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    part.mkdir()
    try:
        shards = _Shards(part, max_shard_bytes)
        for name, t in _tensors(files):
            done = t.nbytes
            if names[name] in plan:
                spec, act_scale = plan[names[name]]
                q = _quantized(names[name], t, spec, act_scale, device)
                if watch is not None:
                    watch(names[name], t, q)
                report.rows.append(Row(names[name], tuple(t.shape), repr(spec), t.nbytes, q.nbytes_packed))
                t = q
            shards.add(names[name] if isinstance(t, QTensor) else name, t)
            if progress is not None:
                progress(done)
        shards.finish()
        _copy_others(source, part)
        data = json.loads((source / "config.json").read_text(encoding="utf-8"))
        data["quantization_config"] = settings.to_dict()
        _write_text(part / "config.json", json.dumps(data, indent=2) + "\n")
        _flush_folder(part)
        os.rename(part, target)
        _flush_folder(parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for left in parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.tmp", left.name):
            shutil.rmtree(left, ignore_errors=True)
    return report


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


def _quantized(name: str, t: Tensor, spec: Spec, act_scale: float | None, device: torch.device | str) -> QTensor:
    data = t.to(device)
    if not torch.isfinite(data).all():
        raise ValueError(f"{name}: the weight has NaN or infinite values, which no format here can hold")
    scale = None if act_scale is None else torch.tensor(act_scale, dtype=torch.float32, device=data.device)
    q = spec.quantize(data, act_scale=scale)
    return q.map(lambda f: f.to("cpu"))


@dataclass
class _Shards:
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
        save_file({name: t.contiguous() for name, t in leaves.items()}, path, metadata=metadata)
        path.chmod(0o666 & ~_umask())
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
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
        _write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")


_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)|.*\.index\.json")


def _copy_others(source: Path, target: Path) -> None:
    """Everything of a model folder that is neither weights nor config.json: tokenizer, code, licence."""
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not _WEIGHTS.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            os.fsync(folder)
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
