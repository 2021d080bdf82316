"""A GGUF file as a model of ours, or a folder: names and config as transformers has them, weights bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dtypes import QTensor
from ...quant import FqnToConfig, Report
from ...quant.report import Row
from ..target_folder import check_absent, new_folder
from ..transformers import AoConfig
from ..written_folder import Shards
from .gguf import TYPES, tensor_of

__all__ = ["GGUFFile", "convert_gguf"]

_DENSE = ("F32", "F16", "BF16", "F64")


def convert_gguf(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 2 * 10**9,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Write `target`, a folder that `from_pretrained` loads, with the weights of a GGUF file as quantized tensors of ours.

    source: a .gguf file of an architecture that transformers knows. target: must not exist.
    dtype: of the model's computation; of what is not quantized too.
    max_shard_bytes: of a file. progress: called with the bytes of every tensor that is done.

    Types that have no tensor of ours (IQ1 to IQ3, TQ1, TQ2), and tensors that transformers rearranges other than by rows
    (experts), are stored decoded, and the report's notes say which. Rows of attention's projections, which llama.cpp keeps in
    another order, are put back.

    Needs the packages gguf and transformers. Raises FileExistsError where `target` is there, and ValueError for a file that is no
    GGUF file, or of an architecture that transformers does not know. Nothing is left behind then.
    """
    check_absent(target)
    file = GGUFFile(source, dtype)
    report, table = Report(), dict[str, Any]()
    with new_folder(target) as part:
        shards = Shards(part, max_shard_bytes)
        for name, made, stored in file.tensors(progress):
            if isinstance(made, QTensor):
                report.rows.append(Row(name, tuple(made.shape), repr(made.spec), stored, made.nbytes))
                report.quantized_bytes += made.nbytes
                table[name] = made.spec
            shards.add(name, made)
            report.model_bytes += made.nbytes
        shards.finish()
        report.notes += file.notes()
        if table:
            file.config.quantization_config = AoConfig(FqnToConfig(table)).to_dict()
        file.config.save_pretrained(part)
        _save_tokenizer(source, part, report)
    return report


class GGUFFile:
    """The tensors of a GGUF file as transformers' model has them.

    dtype: of the model's computation, and of what is not quantized.
    config: of the model. Raises as `convert_gguf` does.
    """

    def __init__(self, source: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.reader, self.kinds, self.dequantize = _open(source)
        model, self.processor, self.mapping, self.parsed = _model_of(source)
        self.config = model.config
        self.shapes = {name: t.shape for name, t in model.state_dict().items()}
        self.config.dtype = dtype
        self.decoded: dict[str, list[str]] = {}

    def tensors(self, progress: Callable[[int], object] | None = None) -> Iterator[tuple[str, Tensor, int]]:
        """Name in the model, tensor, and bytes in the file. progress: called with the bytes of every tensor that is done."""
        for tensor in self.reader.tensors:
            kind = self.kinds(tensor.tensor_type).name
            found = self._packed(tensor, kind) or self._dense(tensor, kind)
            if found is not None:
                name, t = found
                if name in self.shapes and t.shape != self.shapes[name]:
                    raise ValueError(
                        f"{tensor.name} is of shape {tuple(t.shape)}, and {name} of the model that the file tells of is "
                        f"{tuple(self.shapes[name])}; the file is damaged, or of another model"
                    )
                yield name, t, tensor.data.nbytes
            if progress is not None:
                progress(tensor.data.nbytes)
        for name, t in self.parsed.get("tensors", {}).items():  # what was put together from several, such as experts
            yield name, torch.as_tensor(t).to(self.dtype), 0

    def _packed(self, tensor: Any, kind: str) -> tuple[str, Tensor] | None:
        """The tensor in its blocks, or None where that is not possible."""
        if kind not in TYPES or tensor.name not in self.mapping:
            return None
        rows = _rows_of(tensor, self.processor, self.mapping, self.parsed)
        if rows is None:
            return None
        octets = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(rows.numel(), -1)
        return self.mapping[tensor.name], tensor_of(kind, octets[rows], self.dtype)

    def _dense(self, tensor: Any, kind: str) -> tuple[str, Tensor] | None:
        """The tensor decoded; None for one that is part of another, or of none."""
        if kind not in _DENSE:
            self.decoded.setdefault(kind, []).append(tensor.name)
        result = self.processor.process(
            weights=self.dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=self.mapping,
            parsed_parameters=self.parsed,
        )
        if result.name not in self.mapping:
            return None
        return self.mapping[result.name], torch.from_numpy(result.weights.copy()).to(self.dtype)

    def notes(self) -> list[str]:
        """Which of the tensors that were read are decoded, for a report."""
        notes = []
        for kind, names in self.decoded.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            notes.append(f"stored decoded, in {str(self.dtype)[6:]}: {kind}: {shown}")
        return notes


def _open(source: Path) -> tuple[Any, Any, Any]:
    try:
        from gguf import GGMLQuantizationType, GGUFReader, dequantize
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'ao-lowbit[gguf]'") from error
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        return GGUFReader(source), GGMLQuantizationType, dequantize
    except (ValueError, IndexError) as error:
        raise ValueError(f"{source} is no GGUF file, or is cut short ({error}); copy it again") from error


def _model_of(source: Path) -> tuple[Any, Any, dict[str, str], dict[str, Any]]:
    """The model on meta, what turns llama.cpp's tensors into transformers', names there -> names here, and the parsed file."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    try:
        parsed = load_gguf_checkpoint(str(source), return_tensors=False)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{source}: transformers cannot read this file's architecture: {error}") from error
    settings = dict(parsed["config"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    names = settings.get("architectures") or ()
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model = cls(config) if cls is not None else transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    processor = TENSOR_PROCESSORS.get(parsed["config"]["model_type"], TensorProcessor)(config=parsed["config"])
    return model, processor, get_gguf_hf_weights_map(model, processor), {**parsed, "tensors": {}}


def _rows_of(tensor: Any, processor: Any, mapping: dict[str, str], parsed: dict[str, Any]) -> Tensor | None:
    """The order of the rows of a matrix in transformers' model, found by asking where numbered rows go; None where more than
    rows is rearranged."""
    import numpy as np

    if len(tensor.shape) != 2:
        return None
    count, width = int(tensor.shape[1]), int(tensor.shape[0])
    marks = np.arange(count, dtype=np.float64).reshape(count, 1)
    try:
        rows = processor.process(weights=marks, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed)
    except (ValueError, IndexError, AttributeError):
        return None
    if rows.name != tensor.name or rows.weights.shape != marks.shape:
        return None
    order = torch.from_numpy(np.ascontiguousarray(rows.weights)).flatten().long()
    # A matrix of one column hides what happens to columns: a second look at two rows of the right width.
    wide = np.arange(2 * width, dtype=np.float64).reshape(2, width)
    kept = bool((order == torch.arange(count, device="cpu")).all())
    if kept:
        try:
            other = processor.process(
                weights=wide, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed
            )
        except (ValueError, IndexError, AttributeError):
            return None
        if other.weights.shape != wide.shape or not np.array_equal(other.weights, wide):
            return None
    return order if torch.equal(order.sort().values, torch.arange(count, device="cpu")) else None


def _save_tokenizer(source: Path, part: Path, report: Report) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(part)
    except Exception as error:  # of transformers, of tokenizers, of what they import
        why = (str(error) or type(error).__name__).splitlines()[0]
        report.notes.append(f"the tokenizer was not converted ({why}); copy it from the model's own folder")
