"""The end of quantization-aware training: prepared layers become quantized, or plain, ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...dtypes import Spec
from ..algorithms.recipe import RoundToNearest
from ..choice import Filter, slots_of
from ..config import Config
from ..quantize import Job, check_values, jobs_of
from ..report import Report, Row
from ..rules import FqnToConfig
from .layers import PLAIN, FakeQuantized
from .prepare import linear_by_default


def prepared_layers(model: nn.Module, filter_fn: Filter | None = None) -> list[tuple[str, FakeQuantized]]:
    """The prepared layers by name."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, FakeQuantized)]
    return [(name, m) for name, m in found if filter_fn is None or filter_fn(m, name)]


def convert(model: nn.Module, config: Config | Spec | None, filter_fn: Filter | None) -> Report:
    """Quantize the prepared layers as they were trained. config: None, or what they were prepared for.

    Raises ValueError when no layer is prepared, for a config that says something else than a layer was trained for, and for
    a weight that is sharded.
    """
    jobs = list(_jobs(model, filter_fn))
    if config is not None:
        _compare(model, config, jobs)
    for job, _ in jobs:
        if hasattr(job.parameter, "full_tensor"):
            raise ValueError(
                f"{job.fqn} is sharded; gather the model's state_dict, load it into a prepared model of one process, and "
                "convert that"
            )
        check_values(job.fqn, job.parameter)
    report = Report()
    for job, layers in jobs:
        old = job.parameter
        new = nn.Parameter(layers[0].quantized(), requires_grad=False)
        for layer in layers:
            _plain(layer)
        job.install(new)
        report.rows.append(Row(job.fqn, tuple(old.shape), repr(job.spec), old.nbytes, new.nbytes, "qat"))
    report.measure(model)
    return report


def unprepare(model: nn.Module, filter_fn: Filter | None) -> Report:
    """Turn prepared layers into plain ones with the weights that were trained."""
    jobs = list(_jobs(model, filter_fn))
    for job, layers in jobs:
        if any(layer.weight_scale is not None or layer.act_scale is not None for layer in layers):
            raise ValueError(
                f"{job.fqn}: its scales were trained too, and would be lost; use QATConfig(step='convert'), which keeps them"
            )
    for job, layers in jobs:
        if layers[0].lora_a is not None:
            job.install(nn.Parameter(layers[0].whole_weight().detach(), requires_grad=job.parameter.requires_grad))
        for layer in layers:
            _plain(layer)
    return Report(notes=[f"{len(jobs)} weights are plain again"])


def _plain(layer: FakeQuantized) -> None:
    layer.tear_down()
    layer.__class__ = PLAIN[type(layer)]  # type: ignore[assignment]


def _jobs(model: nn.Module, filter_fn: Filter | None) -> Iterator[tuple[Job, list[FakeQuantized]]]:
    """A job for each weight of prepared layers, and the layers that hold it."""
    layers = {f"{name}.weight" if name else "weight": layer for name, layer in prepared_layers(model, filter_fn)}
    if not layers:
        raise ValueError(
            "no layer is prepared for quantization-aware training"
            + (" among those that filter_fn chooses" if filter_fn is not None else "")
            + "; call quantize_(model, QATConfig(config, step='prepare')) before training"
        )
    for group in slots_of(model):
        if slots := [slot for slot in group if slot.fqn in layers]:
            held = [layers[slot.fqn] for slot in slots]
            yield Job(**vars(slots[0]), slots=slots, spec=held[0].spec, recipe=RoundToNearest()), held


def _compare(model: nn.Module, config: Config | Spec, jobs: list[tuple[Job, list[FakeQuantized]]]) -> None:
    names = {slot.module_fqn for job, _ in jobs for slot in job.slots}
    chosen = None if isinstance(config, FqnToConfig) else lambda _, name: name in names
    wanted = {job.fqn: job.spec for job in jobs_of(model, config, chosen, Report(), default=linear_by_default)}
    for job, _ in jobs:
        if wanted.get(job.fqn, job.spec) != job.spec:
            raise ValueError(
                f"{job.fqn} was trained for {job.spec}, and the config makes it {wanted[job.fqn]}; convert with the config "
                "that it was prepared with, or with none"
            )
