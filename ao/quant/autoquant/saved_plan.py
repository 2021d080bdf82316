"""A plan: which layer becomes what, as JSON. What `autoquant` found on one machine, another process applies at once."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from torch import nn

from ...dtypes import QTensor
from ..atomic_write import atomic_write
from ..choice import few
from ..compiled import unwrapped
from ..config import config_from_dict, config_to_dict
from ..quantize import is_linear, quantize_
from ..report import Report
from ..rules import FqnToConfig


def save_plan(plan: FqnToConfig, path: str | Path) -> None:
    """Write a plan as JSON: full name of a layer -> its config, or null for a layer that stays as it is."""
    table = {name: None if c is None else config_to_dict(c) for name, c in plan.fqn_to_config.items()}
    atomic_write(Path(path), json.dumps(table, indent=2) + "\n")


def load_plan(path: str | Path) -> FqnToConfig:
    """Read what `save_plan` wrote, for `autoquant(model, plan=...)` or `quantize_(model, load_plan(path))`.

    Raises ValueError for a file that holds no plan, or a config that this version does not know.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        return FqnToConfig({name: None if c is None else config_from_dict(c) for name, c in table.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no plan (a JSON object of layer name -> config or null): {error}") from None


def apply_plan(model: nn.Module, plan: FqnToConfig) -> Report:
    """Quantize the model as the plan says, without measuring anything.

    Raises ValueError, before anything changes, unless the plan names layers of this model only, and all its linear layers
    (rules that begin with "re:", or "_default", may cover them).
    """
    inner = unwrapped(model)
    modules = {plain_name(name): name for name, _ in inner.named_modules()}
    table = {modules.get(key, key): config for key, config in plan.fqn_to_config.items()}
    rules = {key for key in table if key.startswith("re:") or key == "_default"}
    known = {*modules.values(), *(name for name, _ in inner.named_parameters(remove_duplicate=False))}
    unknown = sorted(table.keys() - known - rules)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.3)
        raise ValueError(
            f"the plan does not fit this model, which has no {_some(unknown)}"
            + (f"; the nearest names are {', '.join(near)}" if near else "")
        )
    linears = [
        name
        for name, module in inner.named_modules()
        if is_linear(module, name)
        and not few(module, name)
        and not isinstance(module._parameters.get("weight"), QTensor)
    ]
    missing = [name for name in linears if name not in table and f"{name}.weight" not in table]
    if missing and not rules:
        raise ValueError(
            f"the plan does not fit this model: it says nothing of {_some(missing)}; "
            "give each a config, or null to leave it as it is"
        )
    if not rules:
        table = {name: config for name, config in table.items() if config is not None}
    return quantize_(inner, FqnToConfig(table))


def plain_name(name: str) -> str:
    """A full name without the wrapper that `torch.compile` puts around a part of a model."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
