"""A GGUF file as a folder of ours: names and config as transformers reads them, weights in their blocks, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dtypes import QTensor
from ...quant import FqnToConfig, Report
from ...quant.report import Row
from ..folder_quantizer import Shards
from ..target_folder import check_absent, new_folder
from ..transformers import AoConfig
from .gguf import TYPES, tensor_of

__all__ = ["convert_gguf"]

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
    reader, kinds, dequantize = _open(source)
    model, processor, mapping, parsed = _model_of(source)
    report, table = Report(), dict[str, Any]()
    decoded: dict[str, list[str]] = {}
    with new_folder(target) as part:
        shards = Shards(part, max_shard_bytes)
        for tensor in reader.tensors:
            kind = kinds(tensor.tensor_type).name
            made: Tensor | None = None
            name: str | None = None
            if kind in TYPES and tensor.name in mapping:
                rows = _rows_of(tensor, processor, mapping, parsed)
                if rows is not None:
                    octets = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(rows.numel(), -1)
                    name, made = mapping[tensor.name], tensor_of(kind, octets[rows], dtype)
            if made is None:
                result = processor.process(
                    weights=dequantize(tensor.data, tensor.tensor_type),
                    name=tensor.name,
                    tensor_key_mapping=mapping,
                    parsed_parameters=parsed,
                )
                if result.name in mapping:
                    name, made = mapping[result.name], torch.from_numpy(result.weights.copy()).to(dtype)
                if kind not in _DENSE:
                    decoded.setdefault(kind, []).append(tensor.name)
            if isinstance(made, QTensor):
                assert name is not None
                sizes = tensor.data.nbytes, made.nbytes_packed
                report.rows.append(Row(name, tuple(made.shape), repr(made.spec), *sizes, "rtn"))
                table[name] = made.spec
                report.quantized_bytes += made.nbytes_packed
            if made is not None and name is not None:
                shards.add(name, made)
                report.model_bytes += made.nbytes
            if progress is not None:
                progress(tensor.data.nbytes)
        for name, t in parsed.get("tensors", {}).items():  # what was put together from several, such as experts
            shards.add(name, t.to(dtype) if isinstance(t, Tensor) else torch.from_numpy(t).to(dtype))
        shards.finish()
        for kind, names in decoded.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            report.notes.append(f"stored decoded, in {str(dtype)[6:]}: {kind}: {shown}")
        if table:
            model.config.quantization_config = AoConfig(FqnToConfig(table)).to_dict()
        model.config.dtype = dtype
        model.config.save_pretrained(part)
        _save_tokenizer(source, part, report)
    return report


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
    kept = bool((order == torch.arange(count)).all())
    if kept:
        try:
            other = processor.process(
                weights=wide, name=tensor.name, tensor_key_mapping=mapping, parsed_parameters=parsed
            )
        except (ValueError, IndexError, AttributeError):
            return None
        if other.weights.shape != wide.shape or not np.array_equal(other.weights, wide):
            return None
    return order if torch.equal(order.sort().values, torch.arange(count)) else None


def _save_tokenizer(source: Path, part: Path, report: Report) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(part)
    except Exception as error:  # of transformers, of tokenizers, of what they import
        why = (str(error) or type(error).__name__).splitlines()[0]
        report.notes.append(f"the tokenizer was not converted ({why}); copy it from the model's own folder")
