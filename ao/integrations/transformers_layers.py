"""Which parameters of a transformers model an `AoConfig` quantizes, from the names and shapes of a model on the meta device.

Linear layers, GPT-2's `Conv1D`, the experts of a mixture (3-D parameters that hold one linear layer per expert), and, if asked
for, the input embedding and the output head. Only linear layers quantize their activations: of a config that does so, the
others take the weight half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..dtypes import Intx, Spec
from ..quant import Config, FqnToConfig, RoundToNearest, SpecConfig, is_linear
from ..quant.jobs import Planned, planned_specs
from ..quant.report import Report


def plan_for(
    model: nn.Module,
    config: Any,
    keep: list[str],
    embeddings: set[str] = frozenset(),  # type: ignore[assignment]
) -> tuple[dict[str, Planned], Report]:
    """Full name of a parameter -> how it is quantized while it loads; and a Report of what is passed over.

    Arguments and errors are those of `rules_for`; and raises ValueError for a shape that its format does not take, and for a
    recipe or a static activation that needs calibration.
    """
    rules, skipped = rules_for(model, config, keep, embeddings)
    planned, report = planned_specs(model, rules)
    for name, each in planned.items():
        if each.needs_data:
            what = "a static activation" if each.recipe == RoundToNearest() else f"algorithm={each.recipe.label!r}"
            raise ValueError(
                f"{name}: {what} needs calibration, and a model that loads has no data; run "
                "`ao quantize MODEL_DIR OUT_DIR --data FILE`, or load the model as it is, then "
                "ao.quantize_(model, config, calibration_data=batches)"
            )
    report.skipped = {**{name: why for name, why in report.skipped.items() if name in rules.fqn_to_config}, **skipped}
    return planned, report


def rules_for(
    model: nn.Module, config: Any, keep: list[str], embeddings: set[str]
) -> tuple[FqnToConfig, dict[str, str]]:
    """A rule for each parameter that is to be quantized, by its full name; and of what is passed over, why.

    config: an AoConfig.
    keep: the modules that stay as they are, unless a rule names them; names, ends of names, or regular expressions.
    embeddings: names of the weights of the input embedding and the output head, and of what is tied to them.

    Raises ValueError for a rule that matches nothing, and when nothing is left to quantize.
    """
    whole = config.quant_type
    rules = whole if isinstance(whole, FqnToConfig) else FqnToConfig({"_default": whole})
    default = rules.fqn_to_config.get("_default")
    named = FqnToConfig({key: choice for key, choice in rules.fqn_to_config.items() if key != "_default"})
    # A format that everything takes: this raises for rules that match nothing.
    planned_specs(model, FqnToConfig(dict.fromkeys(named.fqn_to_config, Intx(8, (-1, -1)))))
    table: dict[str, Config | Spec | None] = {}
    skipped: dict[str, str] = {}
    for name, kind in candidates(model, embeddings):
        found = named.rules_for(name)
        choice = named.fqn_to_config[found[0]] if found else default
        why = f"the rule {found[0]!r} says None" if found else "no rule matches it"
        if not found and not kind:
            choice, why = None, "not a linear layer; a FqnToConfig can name it"
        elif not found and not all(should_convert_module(n, keep) for n in (name, name.rpartition(".")[0])):
            choice, why = None, _why_kept(name, config, embeddings)
        elif not found and kind == "embedding" and not config.include_embedding:
            choice, why = None, "an embedding; include_embedding=True takes it"
        if choice is None:
            skipped[name] = why
        elif kind == "linear" and name not in embeddings:
            table[name] = choice
        else:
            table[name] = _weight_only(choice, tuple(model.get_parameter(name).shape), kind)
    if not table:
        reasons = "".join(f"; {name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"AoConfig: {type(model).__name__} has nothing to quantize{reasons}")
    return FqnToConfig(table), skipped


def embedding_names(model: Any) -> set[str]:
    """Names of the weights of the input embedding and the output head, and of what is tied to them.

    model: a PreTrainedModel.
    """
    ends = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            ends.append(get())
        except (NotImplementedError, AttributeError):  # a model of something other than tokens
            continue
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(module is end for end in ends) and isinstance(module, (nn.Embedding, nn.Linear))
    }
    ties = getattr(model, "all_tied_weights_keys", {})
    tied = {n for pair in ties.items() if names & set(pair) for n in pair}
    return names | {n for pair in ties.items() if tied & set(pair) for n in pair}


def candidates(model: nn.Module, embeddings: set[str]) -> Iterator[tuple[str, str]]:
    """(full name, kind) of the parameters that could be quantized; the kind of those that only a rule can choose is ""."""
    for prefix, module in model.named_modules():
        for leaf, p in module._parameters.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if p is None or p.dim() < 2 or not p.dtype.is_floating_point:
                continue
            if leaf == "weight" and is_linear(module, prefix):
                yield name, "linear"
            elif leaf == "weight" and isinstance(module, Conv1D):
                yield name, "Conv1D"
            elif leaf == "weight" and isinstance(module, nn.Embedding):
                yield name, "embedding" if name in embeddings else ""
            elif p.dim() == 3 and (hasattr(module, "_apply_gate") or type(module).__name__.endswith("Experts")):
                yield name, "experts"
            elif not leaf.endswith("bias"):
                yield name, ""


def _why_kept(name: str, config: Any, embeddings: set[str]) -> str:
    if config.modules_to_not_convert is not None:
        return "modules_to_not_convert leaves it out"
    if name in embeddings:
        return "the output head and what is tied to it stay as they are; include_embedding=True takes them"
    return "transformers keeps it in the model's dtype"


def _weight_only(choice: Config | Spec, shape: tuple[int, ...], kind: str) -> Config | Spec:
    """The weight half of a config. A head that is tied to the embedding keeps a dynamic activation: the embedding has none."""
    if isinstance(choice, Spec):
        return choice if kind in ("linear", "embedding") else replace(choice, act=None)
    act = choice.act()
    if act is None:
        return choice
    dynamic = choice.act_scale() is None and choice.act_range() is None
    spec = replace(choice.weight(shape), act=act if kind in ("linear", "embedding") and dynamic else None)
    return SpecConfig(spec, algorithm=choice.recipe(), unsupported=choice.unsupported)
