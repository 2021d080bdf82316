"""Jobs: which parameters of a model are quantized, by which Spec and which recipe. Nothing changes here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from .configs import Config, FqnToConfig, SpecConfig
from .observers import RangeMethod
from .recipe import Recipe, RoundToNearest, assemble
from .report import Report
from .statistics import RANGES, Statistics, act_scale, is_finite, statistics_of

Filter = Callable[[nn.Module, str], bool]


def is_linear(module: nn.Module, name: str) -> bool:
    """The default filter: an `nn.Linear`, other than attention's output projection, which PyTorch reads directly."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


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
            slot.owner._parameters[slot.name] = parameter


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


def qualifies(p: Tensor) -> bool:
    return p.dim() >= 2 and p.dtype.is_floating_point and (isinstance(p, QTensor) or p.element_size() > 1)


def plan(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None,
    report: Report,
    algorithm: str | Recipe | None = None,
) -> Iterator[Job]:
    """The jobs of `quantize_(model, config, filter_fn)`; what is passed over goes to the report. Raises as `quantize_` does.

    algorithm: in place of the config's own, and for a Spec, which has none.
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
        chosen = _by_rules(config, slots, report)
    else:
        chosen = _by_filter(config, slots, filter_fn or is_linear, report)

    holders: dict[int, list[Slot]] = {}
    for slot in slots:
        holders.setdefault(id(slot.parameter), []).append(slot)
    matched: dict[int, list[tuple[Slot, Config | Spec]]] = {}
    for slot, choice in chosen:
        matched.setdefault(id(slot.parameter), []).append((slot, choice))
    for key, pairs in matched.items():
        first, choice = pairs[0]
        differing = [s.fqn for s, c in pairs if c != choice]
        if differing:
            raise ValueError(f"{first.fqn} and {differing[0]} are one tied parameter and must have the same config")
        left = [s.fqn for s in holders[key] if s not in [slot for slot, _ in pairs]]
        job = _job([slot for slot, _ in pairs], choice, report, algorithm)
        if job is not None:
            if left:
                report.notes.append(
                    f"{first.fqn} was tied to {', '.join(left)}, which stays as it is: the tie is undone"
                )
            yield job


def planned_specs(
    model: nn.Module, config: Config | Spec, filter_fn: Filter | None = None
) -> tuple[dict[str, Planned], Report]:
    """What `quantize_` would do, from shapes alone: the model may be on the meta device, and stays as it is.

    Returns full name of a parameter -> how it is to be quantized, under every name of a tied one; and a Report of what is
    passed over. Takes the arguments of `quantize_`, and raises what it does.
    """
    report = Report()
    jobs = plan(model, config, filter_fn, report)
    made = [(job, Planned(job.spec, job.recipe, job.act_scale, bool(job.needs))) for job in jobs]
    return {slot.fqn: planned for job, planned in made for slot in job.slots}, report


def _by_filter(
    config: Config | Spec, slots: list[Slot], filter_fn: Filter, report: Report
) -> list[tuple[Slot, Config | Spec]]:
    chosen: list[tuple[Slot, Config | Spec]] = []
    for slot in slots:
        if slot.name != "weight" or not qualifies(slot.parameter):
            continue
        if filter_fn(slot.owner, slot.module_fqn):
            chosen.append((slot, config))
        elif isinstance(slot.owner, nn.Linear):
            report.skipped[slot.fqn] = "filter_fn leaves it out"
    return chosen


def _by_rules(rules: FqnToConfig, slots: list[Slot], report: Report) -> list[tuple[Slot, Config | Spec]]:
    table = dict(rules.fqn_to_config)
    default = table.pop("_default", None)
    used: set[str] = set()
    chosen: list[tuple[Slot, Config | Spec]] = []
    for slot in slots:
        if not qualifies(slot.parameter):
            continue
        keys = rules.rules_for(slot.fqn)
        used.update(keys)
        by_default = slot.name == "weight" and is_linear(slot.owner, slot.module_fqn)
        choice = table[keys[0]] if keys else default if by_default else None
        if choice is not None:
            chosen.append((slot, choice))
        elif keys or isinstance(slot.owner, nn.Linear):
            report.skipped[slot.fqn] = f"the rule {keys[0]!r} says None" if keys else "no rule matches it"
    for key in table.keys() - used:
        known = sorted({n for s in slots if qualifies(s.parameter) for n in (s.fqn, s.module_fqn) if n})
        near = difflib.get_close_matches(key.removeprefix("re:"), known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"FqnToConfig: the rule {key!r} matches no layer; the nearest names are {', '.join(near)}")
    return chosen


def _job(slots: list[Slot], config: Config | Spec, report: Report, algorithm: str | Recipe | None) -> Job | None:
    p = slots[0].parameter
    shape = tuple(p.shape)
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
        act = config.act()
        if act is not None:
            if not isinstance(slots[0].owner, nn.Linear):
                raise ValueError(f"{type(config).__name__} quantizes activations, and only nn.Linear layers do that")
            spec = replace(spec, act=act)
        recipe = config.recipe()
        if recipe.needs and not isinstance(slots[0].owner, nn.Linear):
            raise ValueError(
                f"algorithm={recipe.name!r} needs the inputs of a linear layer, and this is {type(slots[0].owner).__name__}; "
                "use algorithm='hqq' for it, or leave it out with filter_fn"
            )
        if config.act_range() not in (None, "minmax") and recipe.scales:
            raise ValueError(f"algorithm={recipe.label!r} scales the activation, and needs range_method='minmax'")
        recipe.check(spec, shape)
        spec.quantize(torch.empty(shape, dtype=p.dtype, device="meta"))
    except ValueError as error:
        if getattr(config, "unsupported", "raise") == "skip" and not isinstance(p, QTensor):
            report.skipped[slots[0].fqn] = str(error)
            return None
        raise ValueError(f"{slots[0].fqn}: {error}") from None
    return Job(slots, spec, recipe, config.act_scale(), config.act_range())


def _fit(spec: Spec, owner: nn.Module, rank: int) -> Spec:
    """A convolution's kernel dims belong to one block: (1, -1) over (out, in) is (1, -1, -1, -1) over its weight."""
    block = getattr(spec, "block", None)
    if isinstance(owner, nn.modules.conv._ConvNd) and block is not None and len(block) == 2:
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
