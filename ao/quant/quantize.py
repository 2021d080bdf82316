"""`quantize_` and `dequantize_`: a model's weights to QTensors and back, in place."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from ..matmul import set_parameter
from .calibration.sequential import Batch, quantize_in_sequence, restored_on_error
from .calibration.statistics import ATTRIBUTE, Statistics
from .choice import Filter, check_filter, is_linear
from .config import Config, ModelConfig
from .job import Job, check, jobs_of
from .read_format import read_format
from .report import Report, Row, progress, storage_bytes

__all__ = ["Filter", "dequantize_", "is_linear", "quantize_"]


@runtime_checkable
class Conversion(Protocol):
    """A config that changes layers by itself: one of training in low precision (ao.train)."""

    def convert_layers(self, model: nn.Module, filter_fn: Filter | None = None) -> list[str]:
        """Change the layers that the filter takes, and return their names."""


def quantize_(
    model: nn.Module,
    config: Config | Spec | Conversion | str,
    filter_fn: Filter | None = None,
    device: torch.device | str | int | None = None,
    *,
    calibration_data: Iterable[Batch] | None = None,
) -> Report:
    """Quantize the weights of a model in place.

    model: any module. Its layers stay what they are; their `weight` becomes a QTensor.
    config: a config such as `Int4WeightOnlyConfig()`, a Spec such as `Intx(bits=3, block=(1, 64))`, rules by name
        (`FqnToConfig`), the name of a format: those of `ao formats` ("int4-g128"), of configs ("int4_weight_only"), with
        recipes ("int4-g128+gptq"); or a config of training in low precision, such as
        `ao.train.Int8WeightOnlyQuantizedTrainingConfig()`.
    filter_fn: `(module, fully qualified name) -> bool`, which layers to quantize; by default what multiplies as a linear layer
        does: every `nn.Linear`, transformers' `Conv1D` (GPT-2), and the experts of a mixture, 3-D parameters of (E, N, K);
        but for layers of fewer than 16 outputs or inputs, such as a classifier or a router, which save nothing and decide much.
        Layers with a floating-point `weight` of two or more dims qualify: linears, embeddings, convolutions; and experts.
        With `FqnToConfig` the rules decide, and it must be None.
    device: move the model there layer by layer, each quantized on arrival, so that at most one layer is ever there in full
        precision; with `calibration_data`, one block.
    calibration_data: batches to run the model on, for recipes (`algorithm="gptq"`) and static activations that need to know
        the inputs of layers. A batch is a tensor, a tuple of arguments, or a dict of keyword arguments. Without it, they use
        what `calibrate` saw.

    Returns a Report, which prints as a table, says of every other large parameter why it is left alone, says so where nothing
    is quantized, and ends with the share of the model's bytes that is. Only linear layers quantize their activations; others
    take the weight half of a config.

    Tied parameters stay tied. Where a filter or the default takes only some of their layers, such as a head that is tied to an
    embedding, they stay as they are; a rule (`FqnToConfig`) that names one of them quantizes them as one.

    Every layer is checked before the first one changes, and a call which raises leaves the model as it was. Raises
    ValueError for a shape that the format does not take (with the parameter's name and the fix), for a weight that is
    quantized already or not finite, for a rule or a filter that matches nothing, for a layer that needs calibration and had
    none, or nothing but zeros where a static scale is asked for, for calibration data that gives a layer NaN or infinite inputs
    (with the batch), and for a layer that a filter or a rule asks for and that cannot compute with a quantized weight (weight
    normalization, pruning, standardized convolutions); and TypeError for what is not a model, a config or a filter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"quantize_ takes a model, an nn.Module, got {type(model).__name__}; a tensor is for Spec.quantize"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "quantize_: the model is a program of torch.jit, which is fixed; quantize the model, then trace it"
        )
    if filter_fn is not None:
        check_filter("quantize_", filter_fn)
    if isinstance(config, str):
        config = read_format(config)
    batches = None if calibration_data is None else batches_of(calibration_data)
    if isinstance(config, ModelConfig):
        return config.apply(model, filter_fn, batches)
    if isinstance(config, Conversion) and not isinstance(config, (Config, Spec)):
        return _convert_layers(model, config, filter_fn, device, batches)
    report = Report()
    jobs = jobs_of(model, config, filter_fn, report)
    for job in jobs:
        check(job)
    in_sequence = batches is not None and any(job.needs for job in jobs)
    seen = [] if in_sequence else [job.seen() for job in jobs]
    if not jobs:
        report.notes.append(
            "nothing was quantized: by default linear layers are; filter_fn, or a rule by name (FqnToConfig), takes others"
        )
    target = None if device is None else _there(device)
    if in_sequence:
        assert batches is not None
        with restored_on_error(model, jobs, target):
            finish = functools.partial(quantize_job, device=target, report=report)
            quantize_in_sequence(model, jobs, batches, target, finish)
        place = {job.fqn: i for i, job in enumerate(jobs)}
        report.rows.sort(key=lambda row: place[row.name])
    else:
        for job, known in progress(list(zip(jobs, seen)), "quantize"):
            quantize_job(job, known, target, report)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)
    if target is not None:
        model.to(target)
    report.measure(model)
    return report


def _there(device: torch.device | str | int) -> torch.device:
    """A device that this machine has. Raises ValueError for another."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"quantize_: device={device!r} is not there: {str(error).splitlines()[0]}") from error


def _convert_layers(
    model: nn.Module,
    config: Conversion,
    filter_fn: Filter | None,
    device: torch.device | str | int | None,
    batches: list[Batch] | None,
) -> Report:
    """`quantize_` with a config of training. Layers on their way to a device are moved first: they are not made smaller."""
    if isinstance(config, type):
        raise TypeError(f"quantize_ takes a config, and {config.__name__} is a class; call it first")
    if batches is not None:
        raise ValueError(f"quantize_: {type(config).__name__} needs no calibration_data; leave it out")
    if device is not None:
        model.to(_there(device))
    sizes = {id(module): storage_bytes(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    report = Report()
    for name in config.convert_layers(model, filter_fn):
        layer = model.get_submodule(name)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        form = repr(weight.spec) if isinstance(weight, QTensor) else str(weight.dtype).removeprefix("torch.")
        size = sizes[id(layer)], storage_bytes(weight)
        row = Row(f"{name}.weight" if name else "weight", tuple(weight.shape), form, *size, type(config).__name__)
        report.rows.append(row)
    report.measure(model)
    return report


def batches_of(data: Iterable[Batch]) -> list[Batch]:
    """The batches of `calibration_data`. Raises TypeError for what is one batch, ValueError where there is none."""
    if isinstance(data, (Tensor, dict)):
        raise TypeError(
            f"quantize_: calibration_data must be an iterable of batches, got one {type(data).__name__}; put it in a list"
        )
    batches = list(data)
    if not batches:
        raise ValueError("quantize_: calibration_data has no batches; give at least one")
    return batches


def quantize_job(job: Job, seen: Statistics | None, device: torch.device | None, report: Report) -> None:
    """Quantize the parameter of a job, and install it. What is to be said of it goes to the report."""
    old = job.parameter
    data = old.detach() if device is None else old.detach().to(device)
    new, found = job.quantize(data, seen)
    if found is not None:
        report.notes.extend(f"{job.fqn}: {note}" for note in found.notes)
        if found.bias is not None and not _add_to_bias(job, found.bias):
            report.notes.append(f"{job.fqn}: its bias is not corrected: it would be beyond the range of {old.dtype}")
    new._is_param = True  # type: ignore[attr-defined]  # nn.Parameter(new) would make a view first, and nobody else holds this
    job.install(new)  # type: ignore[arg-type]
    report.rows.append(job.row(old, new))


def _add_to_bias(job: Job, bias: Tensor) -> bool:
    """Add `bias` to that of the layer, unless the sum is beyond the range of its dtype; whether it was done."""
    sums = []
    for owner in job.owners:
        old = owner._parameters.get("bias")
        whole = bias if old is None else old.detach().to(bias) + bias
        sums.append(whole.to(job.parameter.dtype))
    if not all(t.is_meta or bool(t.isfinite().all()) for t in sums):
        return False
    for owner, t in zip(job.owners, sums):
        owner._parameters["bias"] = nn.Parameter(t, requires_grad=False)
    return True


def dequantize_(model: nn.Module, filter_fn: Filter | None = None) -> nn.Module:
    """Turn quantized parameters back into plain ones, in place, and return the model. Tied ones stay tied.

    filter_fn: `(module, fully qualified name) -> bool`, which layers; by default all.
    """
    if filter_fn is not None:
        check_filter("dequantize_", filter_fn)
    done: dict[int, nn.Parameter] = {}
    for fqn, module in model.named_modules():
        if filter_fn is not None and not filter_fn(module, fqn):
            continue
        for name, p in module._parameters.items():
            if isinstance(p, QTensor):
                if id(p) not in done:
                    done[id(p)] = nn.Parameter(p.detach().dequantize(), requires_grad=p.requires_grad)
                set_parameter(module, name, done[id(p)])
    return model
