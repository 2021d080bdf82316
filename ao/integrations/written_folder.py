"""A Hugging Face model folder that is being written: weights in shards, everything else of the folder that it is made from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..dtypes.checkpoint import INDEX, SINGLE, flatten, writing
from ..quant.report import storage_bytes
from .target_folder import new_folder


@contextmanager
def written_folder(source: Path, target: Path, limit: int) -> Iterator[Shards]:
    """The shards of `target`, a model folder made from `source`: fill them, and write_config.

    What `copy_others` copies is there at the end, and the folder whole or not at all. limit: bytes of a file.
    """
    with new_folder(target) as part:
        shards = Shards(part, limit)
        copy_others(source, part)
        yield shards
        shards.finish()


@dataclass
class Shards:
    """Safetensors files in `folder`, each of at most `limit` bytes or of one tensor. They get their names at the end."""

    folder: Path
    limit: int
    pending: dict[str, Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    total: int = 0
    written: list[list[str]] = field(default_factory=list)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The config.json of the folder."""
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

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
