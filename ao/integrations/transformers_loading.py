"""How the loader of transformers makes quantized parameters: from full precision as it reads, or from a checkpoint of ours.

The loader renames each stored tensor, collects what belongs to one parameter, and gives it to operations. `Quantize` turns
a tensor that was read into a quantized parameter before the next one is read. `Fields` collects the fields of a quantized
tensor under its exact name, and makes it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..dtypes import QTensor
from ..dtypes.checkpoint import quantized_entries, stored_names, unflatten
from ..quant.quantize import Job, check_values
from ..quant.report import Report, Row
from .foreign.checkpoint import ForeignCheckpoint
from .joined_parameters import Joined, joined_parameters
from .mapped_memory import MappedFiles
from .stored_tensors import StoredTensors, only_safetensors

Plan = Mapping[str, Job]
"""Full name of a parameter -> its job."""


class Quantize(ConversionOps):
    """Full precision -> a quantized parameter, for the parameters of the plan."""

    def __init__(self, plan: Plan, report: Report, files: MappedFiles) -> None:
        self.plan = plan
        self.report = report
        self.files = files

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantize:
        return self  # the loader copies the operations for every tensor

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Each value of `input_dict` by full name: a tensor, or a list of one."""
        made: dict[str, Any] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            if name in self.plan:
                refuse_sharded(model, name)
                made[name] = self.quantize(name, value)
                self.files.read(value)
            else:
                made[name] = value
            del value
        return made

    def quantize(self, name: str, value: Tensor) -> nn.Parameter:
        """The parameter called `name`, from its values."""
        q = quantize_named(self.plan[name], name, value, self.report)
        return nn.Parameter(q, requires_grad=False)


def quantize_named(job: Job, name: str, value: Tensor, report: Report) -> QTensor:
    """Quantize the parameter called `name`, one of the names of the job's, and say so in the report. Raises ValueError for NaN
    and infinite values, and for those that are beyond the format's range."""
    check_values(name, value, job)
    q, found = job.quantize(value)
    report.rows.append(Row(name, tuple(value.shape), repr(job.spec), value.nbytes, q.nbytes, job.recipe.label))
    report.notes.extend(f"{name}: {note}" for note in (found.notes if found is not None else ()))
    return q


@dataclass
class Stored:
    """The quantized tensors of a checkpoint: their entries in the headers of its files, by name."""

    entries: dict[str, dict[str, Any]]
    names: Collection[str] = frozenset()
    """Of all stored tensors."""
    checked: set[Hashable] = field(default_factory=set)

    @property
    def parameters(self) -> list[str]:
        """The full names of the quantized tensors."""
        return list(self.entries)

    def stored_names(self, name: str) -> list[str]:
        """What is stored of a quantized tensor, its guard first."""
        return [name, *stored_names(name, self.entries[name])]

    def make(self, name: str, get: Callable[[str], Tensor], dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The tensor, which dequantizes to `dtype`. get: what is stored under a name."""
        return unflatten(name, self.entries[name], get, self.checked).to(dtype)

    @classmethod
    def of(cls, files: list[str]) -> Stored:
        """Read the headers. Raises ValueError if a file has none, or lacks tensors that its header describes."""
        stored = StoredTensors(only_safetensors(files))
        entries: dict[str, dict[str, Any]] = {}
        for path, metadata in zip(files, stored.metadata):
            try:
                entries |= quantized_entries(metadata)
            except ValueError as e:
                raise ValueError(
                    f"{path}: {e}. Its config.json says that ao quantized it; the metadata of the file must have been "
                    "lost on the way, so copy or save it again"
                ) from None
        for name, entry in entries.items():
            lost = [field_ for field_ in stored_names(name, entry) if field_ not in stored.names]
            if lost:
                raise ValueError(
                    f"the checkpoint in {Path(files[0]).parent} lacks {lost}; copy or save all files again"
                )
        return cls(entries, frozenset(stored.names))

    def make_room(self, model: nn.Module) -> None:
        """A bias for the layers that have one in the checkpoint only: some recipes add it."""
        for name in self.entries:
            path, _, leaf = name.rpartition(".")
            bias = f"{path}.bias"
            if leaf != "weight" or bias not in self.names:
                continue
            with contextlib.suppress(AttributeError):  # a part that this model does not have; the loader reports it
                layer = model.get_submodule(path)
                if isinstance(layer, nn.Linear) and layer.bias is None:
                    w = layer.weight
                    layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=w.dtype, device=w.device))


class Fields(WeightConverter):
    """Collects what is stored of each quantized tensor for its parameter, by exact names in place of patterns."""

    def __init__(
        self, stored: Stored | ForeignCheckpoint, conversions: list[Any], model: Any, hf_quantizer: Any
    ) -> None:
        self.targets: dict[str, tuple[str, str]] = {}  # stored name, after renaming -> parameter, key
        sources: dict[str, tuple[Joined, dict[str, list[str]]]] = {}  # parameter -> how it is made, key -> stored names
        keys: dict[str, str] = {}  # what a stored name ends with -> a name that no other ends with
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        for target, joined in joined_parameters(stored.parameters, conversions, model).items():
            sources[target] = joined, {}
            for name in joined.names:
                for field_ in stored.stored_names(name):
                    end = field_.removeprefix(name.rpartition(".")[0])
                    key = keys.setdefault(end, f"{len(keys)}:")
                    sources[target][1].setdefault(key, []).append(field_)
                    self.targets[rename_source_key(field_, renamings, [])[0]] = target, key
        for _, by_key in sources.values():
            for names in by_key.values():
                names.sort(key=dot_natural_key)  # as the loader reads them
        super().__init__(list(keys.values()) or ["0:"], [""], [Unflatten(stored, sources, hf_quantizer)])

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightConverter:
        return WeightConverter(list(self.source_patterns), [""], self.operations)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(parameter, key) of a stored name, or the name and None."""
        if source_key not in self.targets:
            return source_key, None
        self._was_used = True
        return self.targets[source_key]


class Unflatten(ConversionOps):
    """What is stored of the quantized tensors that make up a parameter -> the parameter."""

    def __init__(
        self,
        stored: Stored | ForeignCheckpoint,
        sources: Mapping[str, tuple[Joined, Mapping[str, list[str]]]],
        hf_quantizer: Any,
    ) -> None:
        self.hf_quantizer = hf_quantizer  # by this attribute the loader knows to leave the dtype of the fields alone
        self.stored = stored
        self.sources = sources

    def __deepcopy__(self, memo: dict[int, Any]) -> Unflatten:
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """input_dict: key -> a list of plain tensors."""
        refuse_sharded(model, full_layer_name)
        joined, keys = self.sources[full_layer_name]
        tensors = {name: t for key, names in keys.items() for name, t in zip(names, input_dict[key])}
        q = joined.make(full_layer_name, model, self.stored, tensors.__getitem__)
        return {full_layer_name: nn.Parameter(q, requires_grad=False)}


def refuse_sharded(model: Any, name: str) -> None:
    """Raise NotImplementedError for a parameter that tensor parallelism has sharded."""
    if type(model.get_parameter_or_buffer(name)).__name__ == "DTensor":
        raise NotImplementedError(
            f"{name} is sharded by tensor parallelism, which transformers does while it loads; load without tp_plan, and shard "
            "the quantized model with torch.distributed.tensor"
        )
