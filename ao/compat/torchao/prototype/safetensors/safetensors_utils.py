"""torchao.prototype.safetensors.safetensors_utils."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["is_metadata_torchao"]


def is_metadata_torchao(metadata: Mapping[str, Any] | None) -> bool:
    """Whether metadata is that of `flatten_tensor_state_dict`."""
    if not metadata or "tensor_names" not in metadata:
        return False
    try:
        names = json.loads(metadata["tensor_names"])
        return all("_type" in json.loads(metadata[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        return False
