"""Which config each parameter of a model gets: by a rule, by a filter, or by default. The one place that decides it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..dtypes import QTensor, Spec
from .config import Config, ModelConfig
from .coverage import LARGE, Default, by_default, is_experts, is_matrix, qualifies, why_no_parameter
from .report import Report
from .rules import FqnToConfig
from .slots import Filter, Slot, slots_of, tied

__all__ = ["Chosen", "choices"]


@dataclass(frozen=True)
class Chosen:
    """A parameter that is to be quantized: every slot that holds it, its config, and whether a rule or a filter asks for it."""

    slots: list[Slot]
    config: Config | Spec
    asked: bool


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
    if not isinstance(config, (Config, Spec)) or isinstance(config, ModelConfig):
        raise TypeError(
            f"quantize_ takes a config such as Int4WeightOnlyConfig() or a Spec such as Intx(bits=4), got {config!r}"
            + ("; call it first" if isinstance(config, type) else "")
            + ("; FqnToConfig(rules) takes a dict of name -> config" if isinstance(config, dict) else "")
        )
    slots = list(slots_of(model))
    if isinstance(config, FqnToConfig):
        if filter_fn is not None:
            raise ValueError("quantize_: filter_fn must be None with FqnToConfig, whose rules choose the layers")
        verdicts = _by_rules(config, model, slots, default)
    elif filter_fn is not None:
        verdicts = _by_filter(config, model, slots, filter_fn)
    else:
        reasons = {slot.fqn: default(slot) for slot in slots}
        verdicts = {fqn: Verdict(None if why else config, why) for fqn, why in reasons.items()}
    for name, module in model.named_modules():
        weight = module._buffers.get("weight")
        if weight is not None and not isinstance(weight, QTensor) and (why := why_no_parameter(module)):
            report.skipped[_weight_of(name)] = why
    found = [_of_one_parameter([(slot, verdicts[slot.fqn]) for slot in group], report) for group in tied(slots, ties)]
    return [chosen for chosen in found if chosen is not None]


def _by_filter(config: Config | Spec, model: nn.Module, slots: list[Slot], filter_fn: Filter) -> dict[str, Verdict]:
    verdicts: dict[str, Verdict] = {}
    for slot in slots:
        why = by_default(slot, asked=True)
        if not qualifies(slot.parameter) or not (slot.name == "weight" or is_experts(slot.owner, slot.parameter)):
            verdicts[slot.fqn] = Verdict(None, why or "filter_fn is asked for layers with a `weight`")
        elif filter_fn(slot.owner, slot.module_fqn):
            verdicts[slot.fqn] = Verdict(config, asked=True)
        else:
            verdicts[slot.fqn] = Verdict(None, why or "filter_fn leaves it out")
    if getattr(config, "unsupported", "raise") == "raise":
        for name, module in model.named_modules():
            if (why := why_no_parameter(module)) and filter_fn(module, name):
                raise ValueError(f"{_weight_of(name)}: {why}, or leave it out with filter_fn")
    if not any(verdict.asked for verdict in verdicts.values()):
        raise ValueError(nothing_taken([slot.module_fqn for slot in slots if not by_default(slot, asked=True)]))
    return verdicts


def nothing_taken(names: list[str]) -> str:
    """What is said where a filter takes no layer. names: of the layers that it could take."""
    shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    there = f"it is asked for each layer as filter_fn(module, name), and the linear ones are {shown}"
    return f"filter_fn takes no layer with a weight; {there if names else 'the model has no linear layer'}"


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
        matrix = p.dim() > 1 and ((is_matrix(p) and not slot.name.endswith("bias")) or not by_default(slot, asked=True))
        if p.numel() > LARGE or matrix:
            report.skipped[slot.fqn] = why
    return None


def _weight_of(module: str) -> str:
    return f"{module}.weight" if module else "weight"
