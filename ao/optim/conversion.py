"""State dicts from elsewhere: of another format, of another device, of other shards, of torch.optim; and for torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ao.dtypes import FlatTensor, QTensor

from .sharded import is_dtensor, local, shard_like

if TYPE_CHECKING:
    from .optimizer import LowBitOptimizer

_TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
"""Settings of torch's optimizers that choose an implementation there."""


@dataclass(frozen=True)
class Kept:
    """A loaded value that torch's load_state_dict shall not touch: it would cast a float32 state to bfloat16."""

    value: Any


def keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A pre-hook of load_state_dict that hides the states from it."""
    return {**state_dict, "state": {k: Kept(v) for k, v in state_dict["state"].items()}}


def kept_states(optimizer: LowBitOptimizer, loaded: dict[str, Any]) -> Any:
    """The states of `optimizer` from those that `keep` hid, by parameter. Settles the param groups of `loaded`, too.

    Raises ValueError for states or settings that do not fit.
    """
    groups = loaded["param_groups"]
    for new, old in zip(groups, optimizer.param_groups):
        for name in _TORCH_ONLY:
            if name not in old:
                new.pop(name, None)
        for name, value in old.items():
            new.setdefault(name, value)
        optimizer.check_group(new)
    made = type(optimizer.state)(dict)
    for group in groups:
        for index, p in enumerate(group["params"]):
            if p in loaded["state"]:
                made[p] = _state(optimizer, p, loaded["state"][p].value, group, index)
    made.update({k: kept.value for k, kept in loaded["state"].items() if not isinstance(k, Tensor)})
    return made


def _state(
    optimizer: LowBitOptimizer, p: Tensor, saved: Mapping[str, Any], group: dict[str, Any], index: int
) -> dict[str, Any]:
    """The states of one parameter from what was saved."""
    if not saved:
        return {}
    specs = optimizer.specs(group, index)
    unknown = saved.keys() - {"step", *(name for name, _ in specs)}
    missing = {name for name, _ in specs} - saved.keys()
    who = f"{type(optimizer).__name__}.load_state_dict: the parameter {index} of its group, of shape {tuple(p.shape)},"
    if missing or unknown:
        raise ValueError(
            f"{who} needs the states {sorted(name for name, _ in specs)} and was given {sorted(saved.keys())}; "
            "load the state dict of an optimizer with the same states"
        )
    state = optimizer.new_state(p, specs)
    # torch.optim.SGD counts no steps; that its state exists says that there was one.
    state["step"].fill_(float(saved.get("step", 1.0)))
    for name, _ in specs:
        value = saved[name]
        if not isinstance(value, Tensor) or value.shape != p.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{who} cannot take the state {name!r}: it has {got}")
        mine, given = local(state[name]), local(_placed_like(value, p))
        if isinstance(given, FlatTensor) and isinstance(mine, FlatTensor) and given.spec == mine.spec:
            mine.blocks.copy_(given.blocks)
        else:
            mine.copy_(given)
    return state


def _placed_like(value: Tensor, p: Tensor) -> Tensor:
    """A loaded state with the placements of `p`. It stays quantized where the shards fall between its blocks."""
    if is_dtensor(value) and is_dtensor(p) and value.placements == p.placements:  # type: ignore[attr-defined]
        return value
    if not is_dtensor(value):
        try:
            return shard_like(value, p, whole=True)
        except ValueError:  # a block would be cut
            pass
    return shard_like(_dequantized(value), p, whole=True)


def torch_form(
    state_dict: dict[str, Any], torch_class: type[torch.optim.Optimizer], names: tuple[str, ...]
) -> dict[str, Any]:
    """What `torch_class` loads, from the state dict of a LowBitOptimizer. names: the states that it knows."""
    build: Any = torch_class
    defaults = build([torch.zeros(1, dtype=torch.float32, device="cpu")]).defaults
    known = (*defaults, "params", "param_names", "initial_lr")
    groups = [{**defaults, **{k: v for k, v in group.items() if k in known}} for group in state_dict["param_groups"]]
    states = {
        k: {name: _dequantized(t) for name, t in state.items() if name in names}
        for k, state in state_dict["state"].items()
    }
    return {"state": states, "param_groups": groups}


def _dequantized(t: Any) -> Any:
    """A state in full precision, as a new tensor."""
    if not isinstance(t, Tensor):
        return t
    mine = local(t)
    values = mine.dequantize() if isinstance(mine, QTensor) else mine.clone()
    return shard_like(values, t)
