"""`sensitivity`: what each layer costs in each format, and mixed precision under a budget of bits.

    found = sensitivity(model, batches)
    quantize_(model, found.config(target_bits=3.5), calibration_data=batches)

Each layer is quantized alone, in each candidate, and the model is run: the effect is what that does to the output. Effects
of layers are taken to add up, which they nearly do while they are small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import Spec, is_finite
from .calibration.sequential import Batch, call
from .choice import Filter
from .config import Config, SpecConfig
from .presets import UIntXWeightOnlyConfig
from .quantize import Job, check_values, jobs_of, quantize_job
from .report import Report, progress
from .rules import FqnToConfig

Loss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> the loss, a scalar."""

CANDIDATES: tuple[Config, ...] = tuple(
    UIntXWeightOnlyConfig(getattr(torch, f"uint{bits}"), 32, algorithm="hqq") for bits in (2, 3, 4, 6)
)
"""2, 3, 4 and 6 bits in groups of 32."""


@dataclass(frozen=True)
class Effect:
    """One layer in one candidate: its size, and by how much the loss rises when this layer alone is quantized so."""

    layer: str
    candidate: int
    bytes: int
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured; prints as a table.

    candidates: the configs. weights: elements of each layer. effects: of each layer in each candidate.
    """

    candidates: tuple[Config, ...]
    weights: dict[str, int]
    effects: tuple[Effect, ...]

    def of(self, layer: str) -> list[Effect]:
        """The effects of one layer, smallest size first."""
        return sorted((e for e in self.effects if e.layer == layer), key=lambda e: e.bytes)

    def choose(self, target_bits: float) -> dict[str, Effect]:
        """A candidate for each layer: at most `target_bits` bits per weight on average, the scales counted, and about the
        least sum of effects there is.

        From the smallest candidate for all, the upgrade that lowers the loss most per byte is taken again and again (on the
        lower hull of each layer's candidates), as long as one fits. Raises ValueError where the smallest are too large.
        """
        chosen = {layer: self.of(layer)[0] for layer in self.weights}
        budget = target_bits * sum(self.weights.values()) / 8
        size = sum(e.bytes for e in chosen.values())
        if size > budget:
            least = 8 * size / sum(self.weights.values())
            raise ValueError(
                f"target_bits={target_bits} is too low for these candidates, which take at least {least:.2f} bits per weight; "
                "add a smaller candidate"
            )
        while True:
            best: tuple[float, Effect] | None = None
            for layer, now in chosen.items():
                for other in self.of(layer):
                    more = other.bytes - now.bytes
                    if more > 0 and size + more <= budget and other.loss < now.loss:
                        gain = (now.loss - other.loss) / more
                        if best is None or gain > best[0]:
                            best = gain, other
            if best is None:
                return chosen
            size += best[1].bytes - chosen[best[1].layer].bytes
            chosen[best[1].layer] = best[1]

    def config(self, target_bits: float, algorithm: Any = None) -> FqnToConfig:
        """A config for each layer under a budget, for `quantize_`.

        target_bits: bits per weight on average, the scales counted.
        algorithm: in place of that of the candidates, such as "gptq".
        """
        configs = [c if algorithm is None else dataclasses.replace(c, algorithm=algorithm) for c in self.candidates]
        return FqnToConfig({layer: configs[e.candidate] for layer, e in self.choose(target_bits).items()})

    def __str__(self) -> str:
        bits = [8 * sum(e.bytes for e in self.effects if e.candidate == i) for i in range(len(self.candidates))]
        total = sum(self.weights.values())
        lines = [("layer", *(f"{b / total:.2f} bits" for b in bits))]
        for layer in self.weights:
            by_candidate = {e.candidate: e.loss for e in self.of(layer)}
            lines.append((layer, *(f"{by_candidate[i]:.3g}" for i in range(len(bits)))))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(ln, widths))) for ln in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    data: Iterable[Batch],
    candidates: Sequence[Config | Spec] = CANDIDATES,
    filter_fn: Filter | None = None,
    loss_fn: Loss | None = None,
) -> Sensitivity:
    """Measure what each layer costs in each candidate. The model is as it was when this returns.

    data: batches, as of `quantize_`; a few thousand tokens do.
    candidates: configs or Specs, whose algorithms need no calibration; by default 2, 3, 4 and 6 bits in groups of 32.
    filter_fn: which layers, by default those that `quantize_` takes.
    loss_fn: (model, batch) -> loss, whose rise is measured; by default KL(original || quantized) of the model's output,
        taken as logits over its last dim, per row, which needs no labels.

    Runs the model once per layer, candidate and batch. Raises ValueError for no layers, no data, a batch for which the model
    gives outputs or a loss that are not finite, and a candidate that a layer does not take.
    """
    batches = list(data)
    configs = tuple(SpecConfig(c) if isinstance(c, Spec) else c for c in candidates)
    jobs = [jobs_of(model, config, filter_fn, Report()) for config in configs]
    if not batches or not configs or not jobs[0]:
        raise ValueError("sensitivity: needs at least one batch, one candidate and one layer")
    for job in (job for each in jobs for job in each):
        check_values(job.fqn, job.parameter, job)
        if job.needs:
            raise ValueError(
                f"sensitivity: candidates must do without calibration, and algorithm={job.recipe.label!r} needs it; "
                "measure with 'hqq', and give config(algorithm=...) the other"
            )
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        measure = _divergence(model, batches) if loss_fn is None else _rise(model, batches, loss_fn)
        work = [(i, job) for i, each in enumerate(jobs) for job in each]
        effects = tuple(_effect(i, job, measure) for i, job in progress(work, "sensitivity"))
    finally:
        for module in training:
            module.training = True
    weights = {job.rule: job.parameter.numel() for job in jobs[0]}
    return Sensitivity(configs, weights, effects)


def _effect(candidate: int, job: Job, measure: Callable[[], float]) -> Effect:
    """Quantize one layer, measure, and put it back."""
    original = job.parameter
    try:
        quantize_job(job, None, None, Report())
        return Effect(job.rule, candidate, job.parameter.nbytes, measure())
    finally:
        job.install(original)


def _rise(model: nn.Module, batches: list[Batch], loss_fn: Loss) -> Callable[[], float]:
    def losses() -> list[float]:
        return [float(loss_fn(model, batch)) for batch in batches]

    before = losses()
    for i, loss in enumerate(before):
        if not math.isfinite(loss):
            raise ValueError(
                f"sensitivity: the loss of batch {i} is {loss}, which nothing can be compared with; leave it out"
            )
    return lambda: _or_infinity(sum(after - loss for after, loss in zip(losses(), before)) / len(batches))


def _divergence(model: nn.Module, batches: list[Batch]) -> Callable[[], float]:
    references = []
    for i, batch in enumerate(batches):
        logits = _logits(call(model, batch, f"sensitivity: batch {i} of data")).float()
        if not is_finite(logits):
            raise ValueError(
                f"sensitivity: the model's output for batch {i} has NaN or infinite values, which nothing can be compared with; "
                "leave it out, or find out where they come from"
            )
        references.append(F.log_softmax(logits, -1))

    def mean() -> float:
        total, rows = 0.0, 0
        for i, (batch, reference) in enumerate(zip(batches, references)):
            log_p = F.log_softmax(_logits(call(model, batch, f"sensitivity: batch {i} of data")).float(), -1)
            total += float(F.kl_div(log_p, reference, reduction="sum", log_target=True))
            rows += reference.numel() // reference.shape[-1]
        return _or_infinity(total / rows)

    return mean


def _or_infinity(loss: float) -> float:
    """Infinity for NaN: a layer that cannot be quantized so is the last to be chosen."""
    return math.inf if math.isnan(loss) else loss


def _logits(output: Any) -> Tensor:
    """The logits of a model's output: itself, what it calls so, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and isinstance(output[0], Tensor):
        found = output[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"sensitivity: the output of the model is {type(output).__name__}; give loss_fn=(model, batch) -> loss"
        )
    return found
