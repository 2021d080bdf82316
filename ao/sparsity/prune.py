"""`prune_`: zeros in the weights of a model, chosen by a pruner, with a report per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import Sparse24
from ..quant import Magnitude, Report, SparseGPT, Wanda
from ..quant.algorithms.pruning import Pruner
from ..quant.calibration.sequential import quantize_in_sequence, restored_on_error
from ..quant.calibration.statistics import Statistics
from ..quant.choice import choices
from ..quant.quantize import Job, batches_of, check_values
from ..quant.report import aligned, by_reason
from .training import SemiSparseLinear

PRUNERS: dict[str, type[Pruner]] = {cls.name: cls for cls in (Magnitude, Wanda, SparseGPT)}


@dataclass(frozen=True)
class PruneRow:
    """One pruned weight: its name and shape, the share of zeros, and what is left of the squares of its numbers."""

    name: str
    shape: tuple[int, ...]
    zeros: float
    kept_energy: float
    note: str = ""


@dataclass
class PruneReport:
    """What `prune_` did, as a value that prints as a table.

    rows: the pruned weights. skipped: name -> why, of every other large parameter.
    """

    algorithm: str
    sparsity: str
    rows: list[PruneRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("layer", "shape", "zeros", "energy kept")]
        for r in self.rows:
            lines.append((r.name, " x ".join(map(str, r.shape)), f"{r.zeros:.1%}", f"{r.kept_energy:.1%}"))
        notes = [f"{r.name}: {r.note}" for r in self.rows if r.note]
        text = [*aligned(lines), *notes, *by_reason(self.skipped)]
        text.append(f"{self.algorithm} to {self.sparsity}")
        return "\n".join(line.rstrip() for line in text)


def prune_(
    model: nn.Module,
    algorithm: str | Pruner = "magnitude",
    sparsity: str | float = "2:4",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    block: int | None = None,
    calibration_data: Iterable[Any] | None = None,
    device: torch.device | str | None = None,
) -> PruneReport:
    """Set weights of a model to zero, in place. The weights stay dense tensors; `sparsify_` stores them without the zeros.

    algorithm: "magnitude", or with calibration data "wanda" or "sparsegpt"; or a pruner with settings, such as
        `SparseGPT("2:4", rounds=0)`, which says sparsity and block itself.
    sparsity: "2:4", any N:M, or the share of zeros such as 0.5. block: of whole blocks of so many rows and columns.
    filter_fn: `(module, fully qualified name) -> bool`, which layers; by default the linear layers that `quantize_` takes.
    calibration_data: batches, as of `quantize_`. Layers are pruned in the order in which they run, each with the inputs that the
        pruned layers before it give.
    device: where blocks are moved while they are calibrated.

    Returns a PruneReport, which prints as a table. Raises ValueError for a shape that has no such pattern, for an algorithm that
    needs calibration and had none, and for weights that are quantized or not finite; the model is then as it was.
    """
    pruner = _pruner(algorithm, sparsity, block)
    passed_over = Report()
    jobs: list[Job] = []
    for each in choices(model, Sparse24(), filter_fn, passed_over):
        job = Job(**vars(each.slots[0]), slots=each.slots, spec=Sparse24(), recipe=pruner)
        _check(job, pruner)
        jobs.append(job)
    batches = None if calibration_data is None else batches_of(calibration_data)
    in_sequence = batches is not None and bool(pruner.needs)
    known = [] if in_sequence else [job.seen() for job in jobs]
    report = PruneReport(pruner.name, str(pruner.pattern), skipped=passed_over.skipped)
    rows: dict[str, PruneRow] = {}

    def finish(job: Job, seen: Statistics | None) -> None:
        rows[job.fqn] = _prune(job, pruner, seen)

    there = None if device is None else torch.device(device)
    with restored_on_error(model, jobs, there):
        if in_sequence:
            assert batches is not None
            quantize_in_sequence(model, jobs, batches, there, finish)
        else:
            for job, seen in zip(jobs, known):
                finish(job, seen)
    report.rows.extend(rows[job.fqn] for job in jobs)
    return report


def _pruner(algorithm: str | Pruner, sparsity: str | float, block: int | None) -> Pruner:
    if isinstance(algorithm, Pruner):
        return algorithm
    if algorithm not in PRUNERS:
        raise ValueError(
            f"prune_: algorithm must be one of {', '.join(PRUNERS)}, or a pruner such as Wanda(), got {algorithm!r}"
        )
    return PRUNERS[algorithm](sparsity, block)


def _check(job: Job, pruner: Pruner) -> None:
    if any(isinstance(owner, SemiSparseLinear) for owner in job.owners):
        raise ValueError(
            f"{job.fqn}: this layer is pruned at every step; call swap_semi_sparse_linear_with_linear first"
        )
    if any(not isinstance(owner, nn.Linear) for owner in job.owners) and pruner.needs:
        raise ValueError(
            f"{job.fqn}: algorithm={pruner.name!r} needs the inputs of an nn.Linear; leave it out with filter_fn"
        )
    try:
        pruner.pattern.check(job.parameter.shape)
        if isinstance(pruner, SparseGPT):
            pruner.check_pattern()
    except ValueError as error:
        raise ValueError(f"{job.fqn}: {error}") from None
    check_values(job.fqn, job.parameter)


@torch.no_grad()
def _prune(job: Job, pruner: Pruner, seen: Statistics | None) -> PruneRow:
    old = job.parameter
    found = pruner.pruned(old.detach(), seen)
    made = found.values.to(old.dtype)
    job.install(nn.Parameter(made, requires_grad=old.requires_grad))
    energy = float(made.float().square().sum() / old.detach().float().square().sum().clamp(min=1e-30))
    return PruneRow(job.fqn, tuple(old.shape), sparsity_of(made), energy, "; ".join(found.notes))


def sparsity_of(weight: Tensor) -> float:
    """The share of zeros of a tensor."""
    return float((weight == 0).sum()) / max(weight.numel(), 1)
