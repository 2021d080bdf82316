"""Jobs: which parameters of a model are quantized, by which Spec and which recipe. Nothing changes here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec, blank
from ..matmul import set_parameter
from .algorithms.recipe import Recipe, RoundToNearest, assemble
from .calibration.observers import RangeMethod
from .calibration.statistics import RANGES, Statistics, act_scale, is_finite, statistics_of
from .config import Config, SpecConfig
from .coverage import (
    LARGE,
    is_experts,
    is_linear,
    is_matrix,
    qualifies,
    why_computed,
    why_no_parameter,
    why_not_by_default,
)
from .report import Report
from .rules import FqnToConfig
from .trial import can_try, why_it_cannot

__all__ = ["Filter", "Job", "Planned", "Slot", "choices", "is_linear", "plan", "planned_specs", "qualifies", "slots_of"]

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Slot:
    """A parameter at its place: `owner.name`, known to the model as `fqn`."""

    owner: nn.Module
    name: str
    fqn: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.name]  # type: ignore[return-value]

    @property
    def module_fqn(self) -> str:
        return self.fqn.rpartition(".")[0]

    @property
    def rule(self) -> str:
        """What a rule of `FqnToConfig` calls it: a layer's weight by the layer's name."""
        return self.module_fqn if self.name == "weight" else self.fqn


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

    def install(self, parameter: nn.Parameter) -> None:
        """Put `parameter` in every slot."""
        for slot in self.slots:
            set_parameter(slot.owner, slot.name, parameter)


@dataclass(frozen=True)
class Planned:
    """How a parameter is to be quantized.

    act_scale: the scale of a static activation that is known.
    needs_data: whether calibration has to come first.
    """

    spec: Spec
    recipe: Recipe
    act_scale: float | None = None
    needs_data: bool = False

    def quantize(self, weight: Tensor) -> QTensor:
        """Quantize a weight, where that needs no data. Raises ValueError for NaN and infinite values, without a name."""
        if not is_finite(weight):
            raise ValueError("the weight has NaN or infinite values, which no format here can hold")
        self.spec.check_range(weight)
        scale = (
            None if self.act_scale is None else torch.tensor(self.act_scale, dtype=torch.float32, device=weight.device)
        )
        if isinstance(self.recipe, RoundToNearest):
            return self.spec.quantize(weight, act_scale=scale)
        return assemble(self.recipe.quantize(weight, self.spec, None), self.spec, weight.dtype, scale)


def slots_of(model: nn.Module) -> Iterator[Slot]:
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield Slot(module, name, f"{prefix}.{name}" if prefix else name)


Default = Callable[[Slot], str]
"""Why a parameter is not quantized where nothing else is said; "" for one that is."""


def by_default(slot: Slot) -> str:
    """The `Default` of `quantize_`."""
    return why_not_by_default(slot.owner, slot.name, slot.parameter)


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a parameter under one of its names.

    choice: its config, or None to leave it alone. why: it is left alone.
    named: whether a rule names it. asked: whether a rule or a filter does.
    """

    choice: Config | Spec | None
    why: str = ""
    named: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Chosen:
    """A parameter that is to be quantized: every slot that holds it, its config, and whether a rule or a filter asks for it."""

    slots: list[Slot]
    config: Config | Spec
    asked: bool


def plan(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None,
    report: Report,
    algorithm: str | Recipe | None = None,
    *,
    default: Default = by_default,
    ties: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """The jobs of `quantize_(model, config, filter_fn)`; what is passed over goes to the report. Raises as `quantize_` does.

    algorithm: in place of the config's own, and for a Spec, which has none. default, ties: as of `choices`.
    """
    for chosen in choices(model, config, filter_fn, report, default, ties):
        job = _job(chosen, report, algorithm)
        if job is not None:
            yield job


def choices(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None,
    report: Report,
    default: Default = by_default,
    ties: Mapping[str, str] | None = None,
) -> list[Chosen]:
    """Which parameters are quantized, by which config. Why the others are not goes to the report.

    Tied slots hold one parameter, and stay tied. A rule that names one of them is for all. Else it is quantized where all of
    them are taken, and stays as it is where one is not.

    default: where no filter and no rule says anything. ties: names of parameters that will be tied, beside those that are.
    """
    if not isinstance(config, (Config, Spec)):
        raise TypeError(
            f"quantize_ takes a config such as Int4WeightOnlyConfig() or a Spec such as Intx(bits=4), got {config!r}"
            + ("; call it first" if isinstance(config, type) else "")
        )
    slots = list(slots_of(model))
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            raise ValueError("quantize_: filter_fn must be None with FqnToConfig, whose rules choose the layers")
        verdicts = _by_rules(config, model, slots, default)
    else:
        verdicts = _by_filter(config, model, slots, filter_fn, default)
    _tell_of_buffers(model, report)
    found = [_of_one_parameter([(slot, verdicts[slot.fqn]) for slot in group], report) for group in _tied(slots, ties)]
    return [chosen for chosen in found if chosen is not None]


def _tied(slots: list[Slot], ties: Mapping[str, str] | None) -> list[list[Slot]]:
    """The slots that hold one parameter each."""
    key = {slot.fqn: id(slot.parameter) for slot in slots}
    for name, other in (ties or {}).items():
        if name in key and other in key and key[name] != key[other]:
            old, new = key[name], key[other]
            key = {fqn: new if k == old else k for fqn, k in key.items()}
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(key[slot.fqn], []).append(slot)
    return list(groups.values())


def _of_one_parameter(verdicts: list[tuple[Slot, Verdict]], report: Report) -> Chosen | None:
    slots = [slot for slot, _ in verdicts]
    named = [(slot, verdict) for slot, verdict in verdicts if verdict.named] or verdicts
    takes = [slot for slot, verdict in named if verdict.choice is not None]
    first, choice = named[0][0], named[0][1].choice
    if named[0][1].named:
        for slot, verdict in named:
            if verdict.choice != choice:
                raise ValueError(
                    f"{first.fqn} and {slot.fqn} are one tied parameter and must have the same config, or None both"
                )
    if len(takes) == len(named):
        assert choice is not None
        rest = [slot.fqn for slot in slots if slot not in takes]
        if rest:
            report.notes.append(f"{first.fqn} is tied to {', '.join(rest)}: they are quantized as one")
        return Chosen(slots, choice, any(verdict.asked for _, verdict in named))
    stays, reason = next((slot, verdict.why) for slot, verdict in named if verdict.choice is None)
    if isinstance(first.parameter, QTensor):
        return None
    for slot, verdict in verdicts:
        why = verdict.why or f"tied to {stays.fqn}, which stays as it is: {reason}"
        p = slot.parameter
        if p.numel() > LARGE or (is_matrix(p) and not slot.name.endswith("bias")) or not by_default(slot):
            report.skipped[slot.fqn] = why
    return None


def _tell_of_buffers(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        weight = module._buffers.get("weight")
        if weight is not None and not isinstance(weight, QTensor) and (why := why_no_parameter(module)):
            report.skipped[_weight_of(name)] = why


def _weight_of(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def planned_specs(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None = None,
    *,
    default: Default = by_default,
    ties: Mapping[str, str] | None = None,
) -> tuple[dict[str, Planned], Report]:
    """What `quantize_` would do, from shapes alone: the model may be on the meta device, and stays as it is.

    Returns full name of a parameter -> how it is to be quantized, under every name of a tied one; and a Report of what is
    passed over. Takes the arguments of `quantize_` and `choices`, and raises what `quantize_` does.
    """
    report = Report()
    jobs = plan(model, config, filter_fn, report, default=default, ties=ties)
    made = [(job, Planned(job.spec, job.recipe, job.act_scale, bool(job.needs))) for job in jobs]
    return {slot.fqn: planned for job, planned in made for slot in job.slots}, report


def _by_filter(
    config: Config | Spec, model: nn.Module, slots: list[Slot], filter_fn: Filter | None, default: Default
) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {}
    for slot in slots:
        why = default(slot)
        if filter_fn is None:
            verdicts[slot.fqn] = Verdict(None if why else config, why)
        elif not qualifies(slot.parameter) or not (slot.name == "weight" or is_experts(slot.owner, slot.parameter)):
            verdicts[slot.fqn] = Verdict(None, why or "filter_fn is asked for layers with a `weight`")
        elif filter_fn(slot.owner, slot.module_fqn):
            verdicts[slot.fqn] = Verdict(config, asked=True)
        else:
            verdicts[slot.fqn] = Verdict(None, why or "filter_fn leaves it out")
    if filter_fn is not None and getattr(config, "unsupported", "raise") == "raise":
        for name, module in model.named_modules():
            if (why := why_no_parameter(module)) and filter_fn(module, name):
                raise ValueError(f"{_weight_of(name)}: {why}, or leave it out with filter_fn")
    return verdicts


def _by_rules(rules: FqnToConfig, model: nn.Module, slots: list[Slot], default: Default) -> dict[str, Verdict]:
    table = dict(rules.fqn_to_config)
    other = table.pop("_default", None)
    used: set[str] = set()
    verdicts: dict[str, Verdict] = {}
    for slot in slots:
        keys = rules.rules_for(slot.fqn) if qualifies(slot.parameter) else []
        used.update(keys)
        if keys:
            why = f"the rule {keys[0]!r} says None"
            verdicts[slot.fqn] = Verdict(table[keys[0]], why if table[keys[0]] is None else "", named=True, asked=True)
        else:
            why = default(slot) or ("" if other is not None else "no rule matches it")
            verdicts[slot.fqn] = Verdict(None if why else other, why)
    for key in table.keys() - used:
        for name, module in model.named_modules():
            if key in rules.rules_for(_weight_of(name)) and (why := why_no_parameter(module)):
                raise ValueError(f"{_weight_of(name)}: {why}, or take it out of the rules")
        known = sorted({n for s in slots if qualifies(s.parameter) for n in (s.fqn, s.module_fqn) if n})
        near = difflib.get_close_matches(key.removeprefix("re:"), known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"FqnToConfig: the rule {key!r} matches no layer; the nearest names are {', '.join(near)}")
    return verdicts


def _job(chosen: Chosen, report: Report, algorithm: str | Recipe | None) -> Job | None:
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
        if algorithm is not None:
            config = replace(config, algorithm=algorithm)
        spec = _fit(config.weight(shape), slots[0].owner, len(shape))
        act = config.act() or spec.act
        spec = replace(spec, act=act if act is not None and _quantizes_input(owners, config) else None)
        if act is not None and spec.act is None and chosen.asked and any(map(by_default, slots)):
            raise ValueError(f"{type(config).__name__} quantizes activations, and only nn.Linear layers do that")
        linear = all(isinstance(owner, nn.Linear) for owner in owners)
        recipe = config.recipe()
        if recipe.needs and not linear:
            other = next(owner for owner in owners if not isinstance(owner, nn.Linear))
            raise ValueError(
                f"algorithm={recipe.name!r} needs the inputs of a linear layer, and this is {type(other).__name__}; "
                "use algorithm='hqq' for it, leave it out with filter_fn=ao.is_linear, or give unsupported='skip'"
            )
        if config.act_range() not in (None, "minmax") and recipe.scales:
            raise ValueError(f"algorithm={recipe.label!r} scales the activation, and needs range_method='minmax'")
        recipe.check(spec, shape)
        if can_try():
            blank(spec, shape)
        else:
            spec.quantize(torch.empty(shape, dtype=p.dtype, device="meta"))
        for slot in slots:
            cannot = why_computed(slot.owner, slot.name) or why_it_cannot(slot.owner, slot.name, p, spec)
            if cannot:
                raise ValueError(cannot)
    except ValueError as error:
        skips = getattr(config, "unsupported", "raise") == "skip" or (cannot and not chosen.asked)
        if skips and not isinstance(p, QTensor):
            report.skipped.update(dict.fromkeys([slot.fqn for slot in slots], str(error)))
            return None
        raise ValueError(f"{slots[0].fqn}: {error}") from None
    static = linear and spec.act is not None
    return Job(slots, spec, recipe, config.act_scale() if static else None, config.act_range() if static else None)


def _quantizes_input(owners: list[nn.Module], config: Config) -> bool:
    """Whether the layers of a parameter quantize their activations, where the config says so. Only linear layers do; others
    take the weight half. What a linear layer is tied to, such as an embedding, does not mind a dynamic one."""
    linear = [isinstance(owner, nn.Linear) for owner in owners]
    dynamic = config.act_scale() is None and config.act_range() is None
    return all(linear) or (any(linear) and dynamic)


def _fit(spec: Spec, owner: nn.Module, rank: int) -> Spec:
    """A convolution's kernel dims belong to one block: (1, -1) over (out, in) is (1, -1, -1, -1) over its weight."""
    block = spec.block
    if isinstance(owner, nn.modules.conv._ConvNd) and len(block) == 2:
        return replace(spec, block=(*block, *([-1] * (rank - 2))))  # type: ignore[call-arg]
    return spec


def check(job: Job) -> None:
    """Raise ValueError for a weight that no format can hold, and for a layer that is still being trained to be quantized."""
    p = job.parameter
    if any(hasattr(owner, "fake_quantized_weight") for owner in job.owners):
        raise ValueError(
            f"{job.fqn} is prepared for quantization-aware training; call quantize_(model, QATConfig(step='convert')), or "
            "FromIntXQuantizationAwareTrainingConfig() first"
        )
    check_finite(p, job.fqn)
    if not p.is_meta:
        try:
            job.spec.check_range(p.detach())
        except ValueError as error:
            raise ValueError(f"{job.fqn}: {error}") from None


def check_finite(p: Tensor, fqn: str) -> None:
    """Raise ValueError for NaN and infinite values."""
    if not p.is_meta and not is_finite(p.detach()):
        raise ValueError(f"{fqn}: the weight has NaN or infinite values, which no format here can hold")


def require_statistics(jobs: list[Job]) -> None:
    """Raise ValueError for a job that needs to know its input and has not been calibrated."""
    for job in jobs:
        lacking = (seen_by(job) or Statistics()).lacks(job.needs)
        if lacking:
            what = f"algorithm={job.recipe.name!r}" if job.recipe.needs else "a static activation"
            raise ValueError(
                f"{job.fqn}: {what} needs calibration ({', '.join(sorted(lacking))}), and there was none; pass "
                "calibration_data=batches, or run data through the model under `with calibrate(model, config):` first"
            )


def seen_by(job: Job) -> Statistics | None:
    """What `calibrate` saw of the input of a job's layers."""
    return next((s for s in map(statistics_of, job.owners) if s is not None), None)


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
