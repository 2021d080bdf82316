"""`Job`: one parameter to quantize, by which Spec and which recipe; and the step from its numbers to a QTensor.

`jobs_of` says from shapes alone what `quantize_` would do, and changes nothing: the model may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec, blank, is_finite
from ..matmul import layer_class, set_parameter
from .algorithms.recipe import Recipe, Rounded, RoundToNearest, assemble
from .calibration.observers import RangeMethod
from .calibration.statistics import RANGES, Statistics, act_scale, statistics_of
from .choice import Chosen, Default, Filter, Slot, by_default, choices, why_computed
from .config import Config, SpecConfig
from .report import Report, Row, storage_bytes
from .trial import why_it_cannot

__all__ = ["Job", "jobs_by_name", "jobs_of"]


@dataclass(frozen=True)
class Job:
    """One parameter to quantize, with every slot that holds it.

    act_scale: the scale of a static activation that is known. act_range: how to find it otherwise; None for no such scale.
    """

    slots: list[Slot]
    spec: Spec
    recipe: Recipe
    act_scale: float | None = None
    act_range: RangeMethod | None = None

    @property
    def fqn(self) -> str:
        return self.slots[0].fqn

    @property
    def parameter(self) -> nn.Parameter:
        return self.slots[0].parameter

    @property
    def owners(self) -> list[nn.Module]:
        return [slot.owner for slot in self.slots]

    @property
    def needs(self) -> frozenset[str]:
        """The observers of its input that it takes."""
        return self.recipe.needs | ({RANGES[self.act_range]} if self.act_range is not None else frozenset())

    def seen(self) -> Statistics | None:
        """What `calibrate` saw of the input of its layers, where it needs that. Raises ValueError where it needs more."""
        needs = self.needs
        if not needs:
            return None
        seen = next((s for s in map(statistics_of, self.owners) if s is not None), None)
        if lacking := (seen or Statistics()).lacks(needs):
            what = f"algorithm={self.recipe.name!r}" if self.recipe.needs else "a static activation"
            raise ValueError(
                f"{self.fqn}: {what} needs calibration ({', '.join(sorted(lacking))}), and there was none; pass "
                "calibration_data=batches, or run data through the model under `with calibrate(model, config):` first"
            )
        return seen

    def quantize(self, weight: Tensor, seen: Statistics | None = None) -> tuple[QTensor, Rounded | None]:
        """The weight as the job has it stored, and what its recipe found, which has notes and perhaps a bias; None for
        round-to-nearest. Raises ValueError where `static_scale` does."""
        found = None
        if not isinstance(self.recipe, RoundToNearest):
            found = self.recipe.quantize(weight, self.spec, seen)
        scale = None
        if self.act_scale is not None:
            scale = torch.tensor(self.act_scale, dtype=torch.float32, device=weight.device)
        elif self.act_range is not None:
            scale = static_scale(self, seen, found.pre_scale if found is not None else None)
        if found is None:
            return self.spec.quantize(weight, act_scale=scale), None
        return assemble(found, self.spec, weight.dtype, scale), found

    def install(self, parameter: nn.Parameter) -> None:
        """Put `parameter` in every slot."""
        for slot in self.slots:
            set_parameter(slot.owner, slot.name, parameter)

    def row(self, before: Tensor, after: Tensor, algorithm: str | None = None) -> Row:
        """What the report says of it. algorithm: by default the label of its recipe."""
        sizes = storage_bytes(before), storage_bytes(after)
        return Row(self.fqn, tuple(before.shape), repr(self.spec), *sizes, algorithm or self.recipe.label)


def jobs_of(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None,
    report: Report,
    *,
    default: Default = by_default,
    ties: Mapping[str, str] | None = None,
) -> list[Job]:
    """The jobs of `quantize_(model, config, filter_fn)`; what is passed over goes to the report. Raises as `quantize_` does.

    default, ties: as of `choices`.
    """
    chosen = choices(model, config, filter_fn, report, default, ties)
    return [job for each in chosen if (job := _job(each, report)) is not None]


def jobs_by_name(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None = None,
    *,
    default: Default = by_default,
    ties: Mapping[str, str] | None = None,
) -> tuple[dict[str, Job], Report]:
    """`jobs_of` by the full name of the parameter, under every name of a tied one; and a Report of what is passed over."""
    report = Report()
    jobs = jobs_of(model, config, filter_fn, report, default=default, ties=ties)
    return {slot.fqn: job for job in jobs for slot in job.slots}, report


def _job(chosen: Chosen, report: Report) -> Job | None:
    slots, config = chosen.slots, chosen.config
    p, owners = slots[0].parameter, [slot.owner for slot in slots]
    shape = tuple(p.shape)
    cannot = ""
    try:
        if isinstance(p, QTensor):
            raise ValueError(
                f"it is quantized already, by {p.spec}; call dequantize_ first, or leave it out with filter_fn"
            )
        if isinstance(config, Spec):
            config = SpecConfig(config)
        spec = config.weight(shape)
        if isinstance(slots[0].owner, nn.modules.conv._ConvNd) and len(spec.block) == 2:
            # A kernel's dims belong to one block: (1, -1) over (out, in) is (1, -1, -1, -1) over the weight.
            spec = replace(spec, block=(*spec.block, *([-1] * (len(shape) - 2))))  # type: ignore[call-arg]
        act, recipe = config.act() or spec.act, config.recipe
        linear = all(isinstance(owner, nn.Linear) for owner in owners)
        if act is not None:
            spec = replace(spec, act=act if _quantizes_input(owners, config) else None)
            if spec.act is None and chosen.asked and any(by_default(slot, asked=True) for slot in slots):
                raise ValueError(f"{type(config).__name__} quantizes activations, and only nn.Linear layers do that")
            if config.act_range() not in (None, "minmax") and recipe.scales:
                raise ValueError(f"algorithm={recipe.label!r} scales the activation, and needs range_method='minmax'")
        if not linear and recipe.needs:
            other = next(owner for owner in owners if not isinstance(owner, nn.Linear))
            raise ValueError(
                f"algorithm={recipe.name!r} needs the inputs of a linear layer, and this is {type(other).__name__}; "
                "use algorithm='hqq' for it, leave it out with filter_fn=ao.is_linear, or give unsupported='skip'"
            )
        if not isinstance(recipe, RoundToNearest):
            recipe.check(spec, shape)
        blank(spec, shape)
        for slot in slots:
            if type(slot.owner) is not nn.Linear or slot.name != "weight":
                cannot = why_computed(slot.owner, slot.name) or why_it_cannot(slot.owner, slot.name, p, spec)
                if cannot:
                    raise ValueError(cannot)
    except ValueError as error:
        skips = getattr(config, "unsupported", "raise") == "skip" or (cannot and not chosen.asked)
        if skips and not isinstance(p, QTensor):
            report.skipped.update(dict.fromkeys([slot.fqn for slot in slots], str(error)))
            return None
        raise ValueError(f"{slots[0].fqn}: {_in_words_of(config, str(error))}") from None
    if act is not None and spec.act is None:
        name = layer_class(next(owner for owner in owners if not isinstance(owner, nn.Linear))).__name__
        note = (
            f"{name}: its weights alone are quantized; {type(config).__name__} quantizes activations, and only nn.Linear layers "
            "do that"
        )
        report.notes += [note] if note not in report.notes else []
    if linear and spec.act is not None:
        return Job(slots, spec, recipe, config.act_scale(), config.act_range())
    return Job(slots, spec, recipe)


def _quantizes_input(owners: list[nn.Module], config: Config) -> bool:
    """Whether the layers of a parameter quantize their activations, where the config says so. Only linear layers do; others
    take the weight half. What a linear layer is tied to, such as an embedding, does not mind a dynamic one."""
    linear = [isinstance(owner, nn.Linear) for owner in owners]
    dynamic = config.act_scale() is None and config.act_range() is None
    return all(linear) or (any(linear) and dynamic)


def check(job: Job) -> None:
    """Raise ValueError for a weight that no format can hold, and for a layer that is still being trained to be quantized."""
    if any(hasattr(slot.owner, "fake_quantized_weight") for slot in job.slots):
        raise ValueError(
            f"{job.fqn} is prepared for quantization-aware training; call quantize_(model, QATConfig(step='convert')), or "
            "FromIntXQuantizationAwareTrainingConfig() first"
        )
    check_values(job.fqn, job.parameter, job)


def check_values(fqn: str, weight: Tensor, job: Job | None = None) -> None:
    """Raise ValueError for NaN and infinite values, and for a weight that is too large or too small for the Spec of `job`, but
    where its recipe makes it fit."""
    if weight.is_meta:
        return
    if not is_finite(weight.detach()):
        raise ValueError(f"{fqn}: the weight has NaN or infinite values, which no format here can hold")
    if weight.dtype == torch.float64 and not is_finite(weight.detach().float()):
        raise ValueError(
            f"{fqn}: the weight has numbers up to {weight.detach().abs().max().item():.3g}, which are beyond the range of "
            "float32, in which formats compute; scale them down first"
        )
    if job is not None and not job.recipe.prunes:
        try:
            job.spec.check_range(weight.detach())
        except ValueError as error:
            raise ValueError(f"{fqn}: {error}") from None


def _in_words_of(config: object, error: str) -> str:
    """An error of a Spec in the words of a config: whoever gave group_size is told of group_size, and of the ways out."""
    fits = re.search(r"; use (?:block=\(1, (\d+)\), )?-1 for the whole dim, or leave this tensor out$", error)
    packs = re.search(r", so nothing can be packed(?=; use 8 bits$)", error)
    if not isinstance(config, Config) or (fits is None and packs is None):
        return error
    if fits is None:
        use = "use 8 bits"
    elif isinstance(config, SpecConfig):
        # A format that has a name has the block that belongs to it.
        use = "" if config.spec in Spec.named else f"use block=(1, {fits[1] or -1})"
    else:
        use = f"use {'group_size=' if hasattr(config, 'group_size') else 'blocks of '}{fits[1] or -1}"
    skip = f"SpecConfig({config.spec}, unsupported='skip')" if isinstance(config, SpecConfig) else "unsupported='skip'"
    said = error[: fits.start() if fits is not None else packs.end() if packs is not None else None]
    return f"{said}; {use}{', ' * bool(use)}give {skip}, or leave it out with filter_fn (--skip)"


def static_scale(job: Job, seen: Statistics | None, pre_scale: Tensor | None = None) -> Tensor | None:
    """The scale of a job's static activation, as it is after `pre_scale`, or None where it has none.

    Raises ValueError for a layer to which nothing came, or nothing but zeros: neither says how large its inputs are.
    """
    if job.act_range is None:
        return None
    assert job.spec.act is not None
    amax = torch.zeros(())
    if seen is not None and seen.calls and pre_scale is None:
        amax = seen.amax(job.act_range, job.spec.act)
    elif seen is not None and seen.calls and pre_scale is not None:
        amax = (seen.observers["channels"].amax * pre_scale[0].abs()).amax()
    if not amax > 0:
        came = "nothing but zeros" if seen is not None and seen.calls else "no data"
        raise ValueError(
            f"{job.fqn}: a static activation needs calibration, and {came} came to this layer; give it data, or leave it "
            "out with filter_fn"
        )
    return act_scale(job.spec.act, amax).to(job.parameter.device)
