"""Slots: the places of a model that hold its parameters, and which of them hold the same one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Filter", "Slot", "check_filter", "slots_of", "tied"]

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


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model that is not empty."""
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield Slot(module, name, f"{prefix}.{name}" if prefix else name)


def tied(slots: Sequence[Slot], ties: Mapping[str, str] | None = None) -> list[list[Slot]]:
    """The slots that hold one parameter each. ties: names of parameters that will be tied, beside those that are."""
    key = {slot.fqn: id(slot.parameter) for slot in slots}
    for name, other in (ties or {}).items():
        if name in key and other in key and key[name] != key[other]:
            old, new = key[name], key[other]
            key = {fqn: new if k == old else k for fqn, k in key.items()}
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(key[slot.fqn], []).append(slot)
    return list(groups.values())
