"""`quantize_` and `dequantize_`: a model's weights to QTensors and back, in place, in one pass.

First `jobs_of` says from shapes alone what there is to do, and changes nothing: the model may be on the meta device. A `Job` is
one parameter to quantize, by which Spec and which recipe. Then each is checked; then each is quantized and installed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec, blank, is_finite
from ..matmul import layer_class, set_parameter
from .algorithms.recipe import Recipe, Rounded, RoundToNearest, assemble
from .calibration.observers import RangeMethod
from .calibration.sequential import Batch, quantize_in_sequence, restored_on_error
from .calibration.statistics import ATTRIBUTE, RANGES, Statistics, act_scale, statistics_of
from .choice import Chosen, Default, Filter, Slot, by_default, check_filter, choices, is_linear, why_computed
from .config import Config, ModelConfig, SpecConfig
from .read_format import read_format
from .report import Report, Row, progress
from .trial import why_it_cannot

__all__ = ["Filter", "Job", "dequantize_", "is_linear", "jobs_by_name", "jobs_of", "quantize_"]


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
    report.measure(model)
    jobs = jobs_of(model, config, filter_fn, report)
    for job in jobs:
        check_values(job.fqn, job.parameter, job)
    calibrated = any(job.needs for job in jobs)
    in_sequence = calibrated and batches is not None
    seen = [job.seen() for job in jobs] if calibrated and not in_sequence else [None] * len(jobs)
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
    return report


@dataclass(frozen=True)
class Job(Slot):
    """One parameter to quantize, at the first slot that holds it.

    slots: all that do. act_scale: the scale of a static activation that is known. act_range: how to find it otherwise; None for
    no such scale.
    """

    slots: list[Slot]
    spec: Spec
    recipe: Recipe
    act_scale: float | None = None
    act_range: RangeMethod | None = None

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
        recipe, kernel = config.recipe, isinstance(slots[0].owner, nn.modules.conv._ConvNd)
        try:
            spec = _spec_of(config, shape, kernel)
        except TypeError:  # a config that holds a list has no hash
            spec = _spec_of.__wrapped__(config, shape, kernel)
        linear = [isinstance(owner, nn.Linear) for owner in owners]
        act_scale = act_range = None
        if takes_act := spec.act is not None:
            act_scale, act_range = config.act_scale(), config.act_range()
            if act_range not in (None, "minmax") and recipe.scales:
                raise ValueError(f"algorithm={recipe.label!r} scales the activation, and needs range_method='minmax'")
            # Only linear layers quantize their input; others take the weight half. What a linear layer is tied to, such as an
            # embedding, does not mind a dynamic scale.
            dynamic = act_scale is None and act_range is None
            if not (all(linear) or (any(linear) and dynamic)):
                spec, act_scale, act_range = replace(spec, act=None), None, None
                if chosen.asked and any(by_default(slot, asked=True) for slot in slots):
                    raise ValueError(
                        f"{type(config).__name__} quantizes activations, and only nn.Linear layers do that"
                    )
        if not all(linear) and recipe.needs:
            other = next(owner for owner in owners if not isinstance(owner, nn.Linear))
            raise ValueError(
                f"algorithm={recipe.name!r} needs the inputs of a linear layer, and this is {type(other).__name__}; "
                "use algorithm='hqq' for it, leave it out with filter_fn=ao.is_linear, or give unsupported='skip'"
            )
        if not isinstance(recipe, RoundToNearest):
            recipe.check(spec, shape)
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
    if takes_act and spec.act is None:
        name = layer_class(next(owner for owner in owners if not isinstance(owner, nn.Linear))).__name__
        note = (
            f"{name}: its weights alone are quantized; {type(config).__name__} quantizes activations, and only nn.Linear layers "
            "do that"
        )
        report.notes += [note] if note not in report.notes else []
    return Job(**vars(slots[0]), slots=slots, spec=spec, recipe=recipe, act_scale=act_scale, act_range=act_range)


@functools.lru_cache(maxsize=256)
def _spec_of(config: Config, shape: tuple[int, ...], kernel: bool) -> Spec:
    """What a config makes of a weight of `shape`, with the Spec of its activation: one object for all layers of a shape, which
    compiled code compares at every call. Raises ValueError for a shape that it does not take. kernel: of a convolution."""
    spec, act = config.weight(shape), config.act()
    if kernel and len(spec.block) == 2:
        # A kernel's dims belong to one block: (1, -1) over (out, in) is (1, -1, -1, -1) over the weight.
        spec = replace(spec, block=(*spec.block, *([-1] * (len(shape) - 2))))  # type: ignore[call-arg]
    blank(spec, shape)
    return spec if act is None else replace(spec, act=act)


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


def check_values(fqn: str, weight: Tensor, job: Job | None = None) -> None:
    """Raise ValueError for a weight that no format can hold: NaN and infinite values. With a job also for one that is too large
    or too small for its Spec, but where its recipe makes it fit, and for a layer that is still being trained to be quantized."""
    if job is not None and any(hasattr(slot.owner, "fake_quantized_weight") for slot in job.slots):
        raise ValueError(
            f"{fqn} is prepared for quantization-aware training; call quantize_(model, QATConfig(step='convert')), or "
            "FromIntXQuantizationAwareTrainingConfig() first"
        )
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


def quantize_job(job: Job, seen: Statistics | None, device: torch.device | None, report: Report) -> None:
    """Quantize the parameter of a job, and install it. What is to be said of it goes to the report."""
    old = job.parameter
    data = old.detach() if device is None else old.detach().to(device)
    new, found = job.quantize(data, seen)
    if found is not None:
        report.notes.extend(f"{job.fqn}: {note}" for note in found.notes)
        if found.bias is not None and not _add_to_bias(job, found.bias):
            report.notes.append(f"{job.fqn}: its bias is not corrected: it would be beyond the range of {old.dtype}")
    new._is_param = True  # as `nn.Parameter(new)` does, after it has made a view: nobody else holds this one
    job.install(new)  # type: ignore[arg-type]
    report.rows.append(Row(job.fqn, tuple(old.shape), repr(job.spec), old.nbytes, new.nbytes, job.recipe.label))
    report.quantized_bytes += old.nbytes


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


def static_scale(job: Job, seen: Statistics | None, pre_scale: Tensor | None = None) -> Tensor | None:
    """The scale of a job's static activation, as it is after `pre_scale`, or None where it has none.

    Raises ValueError for a layer to which nothing came, or nothing but zeros: neither says how large its inputs are.
    """
    if job.act_range is None:
        return None
    assert job.spec.act is not None
    amax = torch.zeros((), dtype=torch.float32, device="cpu")
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
    sizes = {id(module): module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear)}
    report = Report()
    for name in config.convert_layers(model, filter_fn):
        layer = model.get_submodule(name)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        form = repr(weight.spec) if isinstance(weight, QTensor) else str(weight.dtype).removeprefix("torch.")
        size = sizes[id(layer)], weight.nbytes
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
