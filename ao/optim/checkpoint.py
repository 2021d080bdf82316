"""An optimizer's state dict in safetensors files: no pickle, and the quantized states as they are."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import load, save


def save_state_dict(state_dict: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what `optimizer.state_dict()` returned to safetensors files, atomically replacing what was there.

    path: as in `ao.save`. A state is stored as `state.<parameter>.<name>`, and the param groups as JSON text in bytes.

    Raises TypeError for a state that is no tensor, or a setting that JSON and tensors cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for k, state in state_dict["state"].items():
        for name, t in state.items():
            tensors[f"state.{k}.{name}"] = t
    groups = []
    for i, group in enumerate(state_dict["param_groups"]):
        tensors.update({f"group.{i}.{k}": v for k, v in group.items() if isinstance(v, Tensor)})
        groups.append({k: v for k, v in group.items() if not isinstance(v, Tensor)})
    text = json.dumps(groups).encode()
    tensors["param_groups"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save(tensors, path)


def load_state_dict(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state dict that `save_state_dict` wrote, for `optimizer.load_state_dict`, which moves it to the parameters.

    Raises FileNotFoundError for a path that is not there, ValueError for files that `save_state_dict` did not write.
    """
    tensors = load(path, device=device, mmap=False)
    if "param_groups" not in tensors:
        raise ValueError(f"load_state_dict: {path} holds no optimizer; give a path that save_state_dict wrote")
    groups = json.loads(bytes(tensors.pop("param_groups").tolist()))
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    state: dict[Any, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        kind, k, key = name.split(".", 2)
        if kind == "group":
            groups[int(k)][key] = t
        else:
            state.setdefault(int(k), {})[key] = t
    return {"state": state, "param_groups": groups}
