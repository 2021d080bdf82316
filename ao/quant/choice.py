"""Which parameters of a model are quantized, by which config, and why the others are not. The one place that decides it, for
models in place, models that load, and folders.

A rule by name decides, or a filter. Where neither is given, what multiplies as a linear layer does is quantized: the weight of
an `nn.Linear`, that of transformers' `Conv1D`, and the experts of a mixture, 3-D parameters that hold one linear layer per
expert. A linear layer of few outputs or inputs is left out of it: a classifier, a router.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..dtypes import QTensor, Spec
from .config import Config, ModelConfig
from .report import Report
from .rules import FqnToConfig

__all__ = ["Chosen", "Default", "Filter", "Slot", "by_default", "check_filter", "choices", "slots_of"]

Filter = Callable[[nn.Module, str], bool]
"""(module, fully qualified name) -> whether it is taken."""


def check_filter(who: str, filter_fn: object) -> None:
    """Raise TypeError for what cannot be called with a module and its name."""
    what = repr(filter_fn)
    if callable(filter_fn):
        try:
            signature = inspect.signature(filter_fn)
        except ValueError:  # some of C have none
            return
        try:
            signature.bind(None, "")
            return
        except TypeError:
            what = f"one of {signature}"
    raise TypeError(
        f"{who}: filter_fn must be a function (module, name) -> bool, got {what}; FqnToConfig({{name: config, ...}}) takes names"
    )


@dataclass(frozen=True)
class Slot:
    """A parameter at its place: `owner.name`, known to the model as `fqn`."""

    owner: nn.Module
    name: str
    fqn: str

    @property
    def parameter(self) -> nn.Parameter:
        """What is in it now."""
        return self.owner._parameters[self.name]  # type: ignore[return-value]

    @property
    def module_fqn(self) -> str:
        """The name of the owner."""
        return self.fqn.rpartition(".")[0]

    @property
    def rule(self) -> str:
        """What a rule of `FqnToConfig` calls it: a layer's weight by the layer's name."""
        return self.module_fqn if self.name == "weight" else self.fqn


def slots_of(model: nn.Module, ties: Mapping[str, str] | None = None) -> list[list[Slot]]:
    """Every slot of a model that is not empty; together those that hold one parameter.

    ties: names of parameters that will be tied, beside those that are.
    """
    groups: dict[int, list[Slot]] = {}
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                groups.setdefault(id(p), []).append(Slot(module, name, f"{prefix}.{name}" if prefix else name))
    for pair in (ties or {}).items():
        held = [key for key, group in groups.items() if any(slot.fqn in pair for slot in group)]
        if len(held) == 2:
            groups[held[0]] += groups.pop(held[1])
    return list(groups.values())


Default = Callable[[Slot], str]
"""Why a parameter is not quantized where nothing else is said; "" for one that is."""

LARGE = 1000
"""A vector of more elements than this is told of, where it is not quantized; a matrix always is."""

FEW = 16
"""Linear layers of fewer outputs or inputs stay as they are, unless they are asked for: they save nothing, and decide much."""

VECTOR = "a vector, such as a norm's weight or a bias"

BY_RULE = "a rule by its name (FqnToConfig) takes it"


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether a module is an `nn.Linear`, other than attention's output projection, which PyTorch reads directly."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear layer whose weight has shape (K, N)."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.partition(".")[0] == "transformers" for c in type(module).__mro__
    )


def is_experts(module: nn.Module, p: Tensor) -> bool:
    """Whether a parameter holds the linear layers of the experts of a mixture, one per index of its first dim."""
    named = hasattr(module, "_apply_gate") or type(module).__name__.endswith("Experts")
    return named and p.dim() == 3 and min(p.shape[1:]) > 1


def is_matrix(p: Tensor) -> bool:
    """Whether two dims or more have more than one index."""
    return sum(n > 1 for n in p.shape) > 1


def qualifies(p: Tensor) -> bool:
    """Whether a parameter can be quantized: floating point of 16 bits or more, or quantized already, of two or more dims."""
    return p.dim() >= 2 and p.dtype.is_floating_point and (isinstance(p, QTensor) or p.element_size() > 1)


def few(module: nn.Module, name: str) -> str:
    """Why a linear layer is too small to be quantized where nothing asks for it; "" for others, and for one that is the model."""
    p = module._parameters.get("weight")
    if p is None or p.dim() != 2 or min(p.shape) >= FEW or not name:
        return ""
    n, k = reversed(p.shape) if is_conv1d(module) else p.shape
    size = f"{n} outputs, such as a classifier or a router" if n < FEW else f"{k} inputs"
    return f"of {size}: fewer than {FEW} save nothing and decide much; filter_fn or {BY_RULE}"


def by_default(slot: Slot, asked: bool = False) -> str:
    """The `Default` of `quantize_`. asked: whether somebody names the layer, whose size then does not count."""
    owner, leaf, p = slot.owner, slot.name, slot.parameter
    plain = type(owner) is nn.Linear and leaf == "weight" and p.is_floating_point() and p.element_size() > 1
    if plain and (asked or min(p.shape) >= FEW):
        return ""  # as most do
    if p.dim() < 2:
        return VECTOR
    kind = type(owner).__name__
    if computed := why_computed(owner, leaf):
        return computed
    takes = is_experts(owner, p) or (leaf == "weight" and (is_linear(owner, "") or is_conv1d(owner)))
    if takes and qualifies(p):
        return "" if asked or min(p.shape) >= FEW else few(owner, slot.module_fqn)
    if not is_matrix(p):
        return VECTOR
    if not qualifies(p):
        return f"of {p.dtype}, and not floating point of 16 bits or more"
    if isinstance(owner, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return f"a projection of PyTorch's attention, which reads it directly; {BY_RULE}"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"a convolution ({kind}); {BY_RULE}"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return f"an embedding ({kind}); {BY_RULE}"
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return f"of a recurrent layer ({kind})"
    return f"not a linear layer ({kind}); {BY_RULE}"


def why_computed(owner: nn.Module, leaf: str) -> str:
    """Why a parameter is only what a layer's weight is computed from, before each call, and how to end that; "" for others."""
    if isinstance(owner, ParametrizationList):
        return (
            "the layer's weight is computed by a parametrization; remove that first with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        )
    base, _, end = leaf.rpartition("_")
    if end not in ("orig", "g", "v") or base in owner._parameters or not isinstance(getattr(owner, base, None), Tensor):
        return ""
    if end != "orig":
        how = "weight normalization; remove that first with torch.nn.utils.remove_weight_norm(layer, name)"
    elif f"{base}_mask" in owner._buffers:
        how = "pruning; end that first with torch.nn.utils.prune.remove(layer, name)"
    else:
        how = "spectral normalization; remove that first with torch.nn.utils.remove_spectral_norm(layer, name)"
    return f"the layer's weight is computed by {how}"


def why_no_parameter(module: nn.Module) -> str:
    """Why the weight of a layer is none of its parameters, and so cannot be quantized; "" where it is one, or there is none."""
    if "weight" in module._parameters:
        return ""
    computed = module._modules.get("parametrizations")
    if isinstance(computed, nn.ModuleDict) and "weight" in computed:
        return why_computed(computed["weight"], "original")
    for leaf in ("weight_orig", "weight_v"):
        if leaf in module._parameters and (why := why_computed(module, leaf)):
            return why
    weight = module._buffers.get("weight")
    return IS_BUFFER if weight is not None and qualifies(weight) else ""


IS_BUFFER = "a buffer; make it an nn.Parameter first"


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
    groups = slots_of(model, ties)
    slots = [slot for group in groups for slot in group]
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
    found = [_of_one_parameter([(slot, verdicts[slot.fqn]) for slot in group], report) for group in groups]
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
