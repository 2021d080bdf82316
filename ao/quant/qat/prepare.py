"""The beginning of quantization-aware training: layers that compute with the rounding that they will have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...dtypes import Spec, dense
from ..algorithms.recipe import Rounded
from ..calibration.sequential import Batch, quantize_in_sequence, restored_on_error
from ..calibration.statistics import Statistics
from ..choice import Filter, Slot, by_default
from ..config import Config
from ..quantize import Job, check_values, jobs_of, static_scale
from ..report import Report, Row
from .layers import PREPARED, FakeQuantized


@dataclass(frozen=True)
class Adapter:
    """Adapters of low rank (arXiv:2106.09685): W + alpha / rank * B A."""

    rank: int
    alpha: float


@dataclass
class _Start:
    """Where a layer's training starts: a weight other than its own, learned qparams (none if they follow the weight), and the
    scale of a static activation."""

    weight: Tensor | None
    qparams: dict[str, Tensor]
    act_scale: Tensor | None


def prepare(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None,
    batches: Sequence[Batch] | None,
    range_learning: bool,
    adapter: Adapter | None,
) -> Report:
    """Prepare the layers that `config` would quantize. Each is checked before the first one changes.

    Raises ValueError for a layer of another type than `nn.Linear` and `nn.Embedding`, for an algorithm that scales channels,
    and for one that needs calibration and had none.
    """
    report = Report()
    jobs = jobs_of(model, config, filter_fn, report, default=linear_by_default)
    for job in jobs:
        check_values(job.fqn, job.parameter, job)
        _check_layers(job, adapter)
    in_sequence = batches is not None and any(job.needs for job in jobs)
    known = [] if in_sequence else [job.seen() for job in jobs]
    starts: dict[str, _Start] = {}

    def finish(job: Job, seen: Statistics | None) -> None:
        original = job.parameter
        scale = static_scale(job, seen)
        if not range_learning:
            starts[job.fqn] = _Start(None, {}, scale)
            return
        found = job.recipe.quantize(original.detach(), job.spec, seen)
        latent = _latent(original.detach(), found, job.spec)
        starts[job.fqn] = _Start(latent, found.qparams, scale)
        report.notes.extend(f"{job.fqn}: {note}" for note in found.notes)
        # The layers behind it are to see it as it will be.
        job.install(nn.Parameter(found.values.to(original.dtype), requires_grad=original.requires_grad))

    originals = {job.fqn: job.parameter for job in jobs}
    with restored_on_error(model, jobs, None):
        if in_sequence:
            assert batches is not None
            quantize_in_sequence(model, jobs, batches, None, finish)
        else:
            for job, seen in zip(jobs, known):
                finish(job, seen)
    for job in jobs:
        job.install(originals[job.fqn])
        _set_up(job, starts[job.fqn], adapter)
        p = job.parameter
        report.rows.append(Row(job.fqn, tuple(p.shape), repr(job.spec), p.nbytes, p.nbytes, "qat"))
    return report


def linear_by_default(slot: Slot) -> str:
    """Why a parameter is not prepared where nothing else is said; "" for one that is: the weight of an `nn.Linear`."""
    usual = "" if isinstance(slot.owner, nn.Linear) else "quantization-aware training takes nn.Linear and nn.Embedding"
    return by_default(slot) or usual


def _check_layers(job: Job, adapter: Adapter | None) -> None:
    for slot in job.slots:
        owner = slot.owner
        if type(owner) not in PREPARED:
            raise ValueError(
                f"{slot.fqn}: quantization-aware training takes nn.Linear and nn.Embedding, and this is "
                f"{type(owner).__name__}; leave it out with filter_fn, or prepare before the layer is wrapped"
            )
        if isinstance(owner, nn.Embedding) and (owner.max_norm is not None or adapter is not None):
            what = "max_norm" if owner.max_norm is not None else "lora_rank"
            raise ValueError(f"{slot.fqn}: {what} does not go with a quantized embedding; leave it out with filter_fn")
    if hasattr(job.recipe, "rounding"):
        raise ValueError(f"{job.fqn}: training starts from 'rtn', 'hqq' or 'gptq', and not from {job.recipe.label!r}")


def _latent(weight: Tensor, found: Rounded, spec: Spec) -> Tensor | None:
    """The weight nearest to `weight` that rounds to the codes that were found, so that training goes on from where it was;
    None if that is `weight` itself."""
    if torch.equal(spec.round(weight.float(), **found.qparams), found.values):
        return None
    scale = dense(found.qparams["scale"]).float()
    repeats = [n // g for n, g in zip(weight.shape, scale.shape)]
    reach = 0.49 * scale.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1)
    tries = (weight.float(), found.values + (weight.float() - found.values).clamp(-reach, reach))
    latent = found.values.to(weight.dtype)
    for near in reversed([t.to(weight.dtype) for t in tries]):
        latent = torch.where(spec.round(near.float(), **found.qparams) == found.values, near, latent)
    return latent


def _set_up(job: Job, start: _Start, adapter: Adapter | None) -> None:
    weight = job.parameter if start.weight is None else nn.Parameter(start.weight, job.parameter.requires_grad)
    if adapter is not None:
        weight.requires_grad_(False)
    own = {f"weight_{name}": nn.Parameter(dense(t).float().clone()) for name, t in start.qparams.items()}
    if start.act_scale is not None:
        own["act_scale"] = nn.Parameter(start.act_scale.float().clone())
    if adapter is not None:
        n, k = weight.shape
        lora_a = torch.empty(adapter.rank, k, dtype=weight.dtype, device=weight.device)
        own["lora_a"] = nn.Parameter(lora_a.uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k)))
        own["lora_b"] = nn.Parameter(torch.zeros(n, adapter.rank, dtype=weight.dtype, device=weight.device))
    for owner in job.owners:
        owner.__class__ = PREPARED[type(owner)]
        assert isinstance(owner, FakeQuantized)
        owner.set_up(job.spec)
        for name, parameter in own.items():
            setattr(owner, name, parameter)
        if adapter is not None:
            owner.lora_factor = adapter.alpha / adapter.rank
    job.install(weight)
