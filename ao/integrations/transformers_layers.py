"""Which parameters of a transformers model an `AoConfig` quantizes, from the names and shapes of a model on the meta device.

Those that `quantize_` takes by default, and, if asked for, the input embedding and the output head, which else stay as they
are.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from ..quant import FqnToConfig, RoundToNearest
from ..quant.choice import Default, Slot, by_default, choices, few
from ..quant.quantize import Job, jobs_by_name
from ..quant.report import Report


def plan_for(
    model: nn.Module,
    config: Any,
    keep: list[str],
    embeddings: set[str] = frozenset(),  # type: ignore[assignment]
) -> tuple[dict[str, Job], Report]:
    """Full name of a parameter -> its job while the model loads; and a Report of what is passed over.

    config: an AoConfig.
    keep: the modules that stay as they are, unless a rule names them; names, ends of names, or regular expressions.
    embeddings: names of the weights of the input embedding and the output head, and of what is tied to them.

    Raises ValueError for a rule that matches nothing, when nothing is left to quantize, for a shape that its format does not
    take, and for a recipe or a static activation that needs calibration.
    """
    jobs, report = all_jobs(model, config, keep, embeddings)
    for name, job in jobs.items():
        if job.needs:
            what = "a static activation" if job.recipe == RoundToNearest() else f"algorithm={job.recipe.label!r}"
            raise ValueError(
                f"{name}: {what} needs calibration, and a model that loads has no data; run "
                "`ao quantize MODEL_DIR OUT_DIR --data FILE`, or load the model as it is, then "
                "ao.quantize_(model, config, calibration_data=batches)"
            )
    return jobs, report


def all_jobs(model: nn.Module, config: Any, keep: list[str], embeddings: set[str]) -> tuple[dict[str, Job], Report]:
    """`plan_for`, where what needs calibration may have it."""
    default = _default_of(config, keep, embeddings)
    jobs, report = jobs_by_name(model, config.quant_type, default=default, ties=_ties(model))
    if not jobs:
        reasons = "".join(f"; {name}: {why}" for name, why in list(report.skipped.items())[:3])
        raise ValueError(f"AoConfig: {type(model).__name__} has nothing to quantize{reasons}")
    return jobs, report


def rules_for(model: nn.Module, config: Any, keep: list[str], embeddings: set[str]) -> FqnToConfig:
    """A rule for each parameter that is to be quantized, by its full name. Arguments are those of `plan_for`."""
    default = _default_of(config, keep, embeddings)
    found = choices(model, config.quant_type, None, Report(), default, _ties(model))
    return FqnToConfig({slot.fqn: chosen.config for chosen in found for slot in chosen.slots})


def _ties(model: Any) -> dict[str, str]:
    """Name of a parameter -> the one that it is tied to, when the model has loaded."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _default_of(config: Any, keep: list[str], embeddings: set[str]) -> Default:
    """What is quantized where no rule names it."""

    def default(slot: Slot) -> str:
        why = by_default(slot, asked=True)
        end = isinstance(slot.owner, nn.Embedding) and slot.fqn in embeddings
        if why and not end:
            return why
        if not end and config.modules_to_not_convert is None and (small := few(slot.owner, slot.module_fqn)):
            return small
        if not all(should_convert_module(name, keep) for name in (slot.fqn, slot.module_fqn)):
            return _why_kept(slot.fqn, config, embeddings)
        return "an embedding; include_embedding=True takes it" if end and not config.include_embedding else ""

    return default


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


def _why_kept(name: str, config: Any, embeddings: set[str]) -> str:
    if config.modules_to_not_convert is not None:
        return "modules_to_not_convert leaves it out"
    if name in embeddings:
        return "the output head and what is tied to it stay as they are; include_embedding=True takes them"
    return "transformers keeps it in the model's dtype"
