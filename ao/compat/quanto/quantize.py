"""`quantize`, `freeze`, and the map that says which modules are quantized, for saving and loading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from .nn import QModuleMixin, quantize_module
from .optimizers import Optimizer
from .qtype import listed, qtype, read_qtype


def quantize(
    model: nn.Module,
    weights: qtype | str | None = None,
    activations: qtype | str | None = None,
    optimizer: Optimizer | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> None:
    """Put quantized modules in the place of linear layers, 2-D convolutions and, with `activations`, layer norms.

    Weights stay float, and are rounded at each call, until `freeze`. `ao.quantize_` does the whole in one step.

    weights, activations: qtypes or their names ("qint8"). Activations need `Calibration`; without it they stay float.
    optimizer: how scales are found.
    include, exclude: patterns as of a shell, of the modules' full names; a module is quantized that matches one of the first,
        if given, and none of the second.
    """
    weights, activations = read_qtype(weights, "weights"), read_qtype(activations, "activations")
    wanted, unwanted = listed(include), listed(exclude) or []
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if wanted is not None and not any(fnmatch(name, pattern) for pattern in wanted):
            continue
        if not any(fnmatch(name, pattern) for pattern in unwanted):
            made = quantize_module(module, weights, activations, optimizer) if name else None
            if made is not None:
                found[name] = made
    for name, made in found.items():
        _replace(model, name, made)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def freeze(model: nn.Module) -> None:
    """Store the weights of the quantized modules quantized."""
    for module in model.modules():
        if isinstance(module, QModuleMixin):
            module.freeze()


def quantization_map(model: nn.Module) -> dict[str, dict[str, str]]:
    """Full name of each quantized module -> {"weights": name of a qtype or "none", "activations": the same}, JSON-able."""
    return {
        name: {"weights": _name(m.weight_qtype), "activations": _name(m.activation_qtype)}
        for name, m in model.named_modules()
        if isinstance(m, QModuleMixin)
    }


def _name(kind: qtype | None) -> str:
    return "none" if kind is None else kind.name


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    quantization_map: Mapping[str, Mapping[str, str]],
    device: torch.device | str | None = None,
) -> None:
    """Make of a float model, which may be on meta, the quantized one whose `state_dict` and `quantization_map` were saved.

    device: where the model goes; by default where it is, and the CPU for one on meta.

    A model on meta has no numbers of its own: buffers that are never saved, such as the frequencies of rotary embeddings, are
    computed where the model is one of transformers.

    Raises ValueError where the state dict lacks a weight of the map, or of a model on meta anything else.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if torch.device(device).type == "meta" else torch.device(device)
    kinds = {
        name: [None if each.get(key, "none") == "none" else each[key] for key in ("weights", "activations")]
        for name, each in quantization_map.items()
    }
    for name, module in list(model.named_modules()):
        if name in kinds:
            made = quantize_module(module, kinds[name][0], kinds[name][1])
            if made is not None:
                _replace(model, name, made)
    _materialize(model, state_dict)
    model.to(device)
    missing = model.load_state_dict(state_dict, strict=False).missing_keys
    lacking = [key for key in missing if any(key.startswith(f"{name}.weight") for name in quantization_map)]
    if lacking:
        raise ValueError(
            f"requantize: state_dict lacks {', '.join(lacking[:4])}, which quantization_map says is quantized"
        )


def _materialize(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give the tensors on meta memory, which `state_dict` fills, and compute buffers that are never saved. Tied ones stay tied.

    Raises ValueError for another that `state_dict` does not hold.
    """
    # A quantized weight is stored in fields: x.weight._data._data.
    held = {key[:end] for key in state_dict for end in (*(m.start() for m in re.finditer(r"\.", key)), len(key))}
    made: dict[int, Tensor] = {}
    names: dict[int, set[str]] = {}
    for prefix, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, t in table.items():
                if t is None or not t.is_meta:
                    continue
                names.setdefault(id(t), set()).add(f"{prefix}.{name}".lstrip("."))
                if id(t) not in made:
                    empty = torch.full_like(t, _unwritten(t.dtype), device="cpu", requires_grad=False)
                    made[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
                table[name] = made[id(t)]
        unsaved = {id(module._buffers[name]) for name in module._non_persistent_buffers_set}
        compute: Any = getattr(model, "_init_weights", None)  # of transformers
        if compute is not None and unsaved & {id(t) for t in made.values()}:
            compute(module)
    lacking = [
        min(names[key])
        for key, t in made.items()
        if not names[key] & held and bool(torch.isclose(t, t.new_tensor(_unwritten(t.dtype)), equal_nan=True).all())
    ]
    if lacking:
        raise ValueError(
            f"requantize: the model is on meta, and state_dict lacks {', '.join(lacking[:4])}; make the model on the CPU"
        )


def _unwritten(dtype: torch.dtype) -> float | int | bool:
    """What memory of a dtype is filled with, to see whether something was written there."""
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
