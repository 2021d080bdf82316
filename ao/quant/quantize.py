"""`quantize_` and `dequantize_`: a model's weights to QTensors and back, in place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..dtypes import QTensor, Spec
from .configs import Config, FqnToConfig
from .progress import progress
from .report import Report, Row, storage_bytes

Filter = Callable[[nn.Module, str], bool]


def is_linear(module: nn.Module, name: str) -> bool:
    """The default filter: an `nn.Linear`, other than attention's output projection, which PyTorch reads directly."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class _Slot:
    """A parameter at its place: `owner.name`, known to the model as `fqn`."""

    owner: nn.Module
    name: str
    fqn: str

    @property
    def parameter(self) -> Tensor:
        return self.owner._parameters[self.name]  # type: ignore[return-value]

    @property
    def module_fqn(self) -> str:
        return self.fqn.rpartition(".")[0]


@dataclass(frozen=True)
class _Job:
    """One parameter to quantize, with every slot that holds it."""

    slots: list[_Slot]
    spec: Spec
    act_scale: float | None


def quantize_(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Filter | None = None,
    device: torch.device | str | int | None = None,
) -> Report:
    """Quantize the weights of a model in place.

    model: any module. Its layers stay what they are; their `weight` becomes a QTensor.
    config: a config such as `Int4WeightOnlyConfig()`, a Spec such as `Intx(bits=3, block=(1, 64))`, or rules by name
        (`FqnToConfig`).
    filter_fn: `(module, fully qualified name) -> bool`, which layers to quantize; by default every `nn.Linear`. Layers with
        a floating-point `weight` of two or more dims qualify: linears, embeddings, convolutions. With `FqnToConfig` the
        rules decide, and it must be None.
    device: move the model there layer by layer, each quantized on arrival, so that at most one layer is ever there in full
        precision.

    Returns a Report, which prints as a table. Parameters that are tied stay tied when all their layers are quantized; when
    only some are, the tie is undone and the report says so.

    Every layer is checked before the first one changes, so that a call which raises leaves the model as it was. Raises
    ValueError for a shape that the format does not take (with the parameter's name and the fix), for a weight that is
    quantized already and for a rule that matches nothing, and TypeError for what is not a config.
    """
    report = Report()
    jobs = list(_plan(model, config, filter_fn, report))
    for job in jobs:
        _check(job)
    for job in progress(jobs, "quantize"):
        report.rows.append(_quantize(job, device))
    if device is not None:
        model.to(device)
    return report


def planned_specs(
    model: nn.Module, config: Config | Spec, filter_fn: Filter | None = None
) -> tuple[dict[str, tuple[Spec, float | None]], Report]:
    """What `quantize_` would do, from shapes alone: the model may be on the meta device, and stays as it is.

    Returns full name of a parameter -> its Spec and the scale of its static activation, under every name of a tied one;
    and a Report of what is passed over. Takes the arguments of `quantize_`, and raises what it does.
    """
    report = Report()
    jobs = list(_plan(model, config, filter_fn, report))
    return {slot.fqn: (job.spec, job.act_scale) for job in jobs for slot in job.slots}, report


def dequantize_(model: nn.Module, filter_fn: Filter | None = None) -> nn.Module:
    """Turn quantized parameters back into plain ones, in place, and return the model. Tied ones stay tied.

    filter_fn: `(module, fully qualified name) -> bool`, which layers; by default all.
    """
    done: dict[int, nn.Parameter] = {}
    for fqn, module in model.named_modules():
        if filter_fn is not None and not filter_fn(module, fqn):
            continue
        for name, p in module._parameters.items():
            if isinstance(p, QTensor):
                if id(p) not in done:
                    done[id(p)] = nn.Parameter(p.detach().dequantize(), requires_grad=p.requires_grad)
                module._parameters[name] = done[id(p)]
    return model


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield _Slot(module, name, f"{prefix}.{name}" if prefix else name)


def _qualifies(p: Tensor) -> bool:
    return p.dim() >= 2 and p.dtype.is_floating_point and (isinstance(p, QTensor) or p.element_size() > 1)


def _plan(model: nn.Module, config: Config | Spec, filter_fn: Filter | None, report: Report) -> Iterator[_Job]:
    if not isinstance(config, (Config, Spec)):
        raise TypeError(
            f"quantize_ takes a config such as Int4WeightOnlyConfig() or a Spec such as Intx(bits=4), got {config!r}"
            + ("; call it first" if isinstance(config, type) else "")
        )
    slots = list(_slots(model))
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            raise ValueError("quantize_: filter_fn must be None with FqnToConfig, whose rules choose the layers")
        chosen = _by_rules(config, slots, report)
    else:
        chosen = _by_filter(config, slots, filter_fn or is_linear, report)

    holders: dict[int, list[_Slot]] = {}
    for slot in slots:
        holders.setdefault(id(slot.parameter), []).append(slot)
    matched: dict[int, list[tuple[_Slot, Config | Spec]]] = {}
    for slot, choice in chosen:
        matched.setdefault(id(slot.parameter), []).append((slot, choice))
    for key, pairs in matched.items():
        first, choice = pairs[0]
        differing = [s.fqn for s, c in pairs if c != choice]
        if differing:
            raise ValueError(f"{first.fqn} and {differing[0]} are one tied parameter and must have the same config")
        left = [s.fqn for s in holders[key] if s not in [slot for slot, _ in pairs]]
        job = _job([slot for slot, _ in pairs], choice, report)
        if job is not None:
            if left:
                report.notes.append(
                    f"{first.fqn} was tied to {', '.join(left)}, which stays as it is: the tie is undone"
                )
            yield job


def _by_filter(
    config: Config | Spec, slots: list[_Slot], filter_fn: Filter, report: Report
) -> list[tuple[_Slot, Config | Spec]]:
    chosen: list[tuple[_Slot, Config | Spec]] = []
    for slot in slots:
        if slot.name != "weight" or not _qualifies(slot.parameter):
            continue
        if filter_fn(slot.owner, slot.module_fqn):
            chosen.append((slot, config))
        elif isinstance(slot.owner, nn.Linear):
            report.skipped[slot.fqn] = "filter_fn leaves it out"
    return chosen


def _by_rules(rules: FqnToConfig, slots: list[_Slot], report: Report) -> list[tuple[_Slot, Config | Spec]]:
    table = dict(rules.fqn_to_config)
    default = table.pop("_default", None)
    used: set[str] = set()
    chosen: list[tuple[_Slot, Config | Spec]] = []
    for slot in slots:
        if not _qualifies(slot.parameter):
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
        known = sorted({n for s in slots if _qualifies(s.parameter) for n in (s.fqn, s.module_fqn) if n})
        near = difflib.get_close_matches(key.removeprefix("re:"), known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"FqnToConfig: the rule {key!r} matches no layer; the nearest names are {', '.join(near)}")
    return chosen


def _job(slots: list[_Slot], config: Config | Spec, report: Report) -> _Job | None:
    p = slots[0].parameter
    shape = tuple(p.shape)
    try:
        if isinstance(p, QTensor):
            raise ValueError(
                f"it is quantized already, by {p.spec}; call dequantize_ first, or leave it out with filter_fn"
            )
        spec = config if isinstance(config, Spec) else config.weight(shape)
        spec = _fit(spec, slots[0].owner, len(shape))
        act, act_scale = (None, None) if isinstance(config, Spec) else (config.act(), config.act_scale())
        if act is not None:
            if not isinstance(slots[0].owner, nn.Linear):
                raise ValueError(f"{type(config).__name__} quantizes activations, and only nn.Linear layers do that")
            spec = replace(spec, act=act)
        spec.quantize(torch.empty(shape, dtype=p.dtype, device="meta"))
    except ValueError as error:
        if getattr(config, "unsupported", "raise") == "skip" and not isinstance(p, QTensor):
            report.skipped[slots[0].fqn] = str(error)
            return None
        raise ValueError(f"{slots[0].fqn}: {error}") from None
    return _Job(slots, spec, act_scale)


def _fit(spec: Spec, owner: nn.Module, rank: int) -> Spec:
    """A convolution's kernel dims belong to one block: (1, -1) over (out, in) is (1, -1, -1, -1) over its weight."""
    block = getattr(spec, "block", None)
    if isinstance(owner, nn.modules.conv._ConvNd) and block is not None and len(block) == 2:
        return replace(spec, block=(*block, *([-1] * (rank - 2))))  # type: ignore[call-arg]
    return spec


def _check(job: _Job) -> None:
    p = job.slots[0].parameter
    if p.is_meta:
        return
    if not torch.isfinite(p.detach()).all():
        raise ValueError(f"{job.slots[0].fqn}: the weight has NaN or infinite values, which no format here can hold")


def _quantize(job: _Job, device: torch.device | str | int | None) -> Row:
    old = job.slots[0].parameter
    data = old.detach() if device is None else old.detach().to(device)
    act_scale = None
    if job.act_scale is not None:
        act_scale = torch.tensor(job.act_scale, dtype=torch.float32, device=data.device)
    new = nn.Parameter(job.spec.quantize(data, act_scale=act_scale), requires_grad=False)
    for slot in job.slots:
        slot.owner._parameters[slot.name] = new
    return Row(job.slots[0].fqn, tuple(old.shape), repr(job.spec), storage_bytes(old), storage_bytes(new))
