"""`QuantState`: what it takes, beside the codes, to dequantize. Its dict is what checkpoints of bitsandbytes hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_PACKED = "quant_state.bitsandbytes__"
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class QuantState:
    """absmax: the largest magnitude of each block of `blocksize` elements, float32; or codes of them, uint8, with `state2`.

    shape, dtype: of the data. code: the table, by code. quant_type: "nf4", "fp4" or None.
    offset, state2: of double quantization: absmax = state2.code[absmax] * state2.absmax + offset.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: Any = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax, self.code, self.blocksize = absmax, code, blocksize
        self.shape = None if shape is None else torch.Size(shape)
        self.quant_type, self.dtype, self.offset, self.state2 = quant_type, dtype, offset, state2

    @property
    def nested(self) -> bool:
        """Whether `absmax` is quantized itself."""
        return self.state2 is not None

    def __getitem__(self, index: Any) -> Any:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        mine, its = self.as_dict(), other.as_dict()
        return mine.keys() == its.keys() and all(
            torch.equal(v, its[k]) if isinstance(v, Tensor) else v == its[k] for k, v in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dict. packed: tensors alone; what is no tensor becomes JSON in one of bytes."""
        found: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            found["nested_absmax"] = self.state2.absmax
            found["nested_blocksize"] = self.state2.blocksize
            found["nested_quant_map"] = None if self.state2.code is None else self.state2.code.clone()
            found["nested_dtype"] = str(self.state2.dtype).removeprefix("torch.")
            found["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return found
        words = {k: v for k, v in found.items() if not isinstance(v, Tensor)}
        octets = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)
        return {k: v for k, v in found.items() if isinstance(v, Tensor)} | {f"{_PACKED}{self.quant_type}": octets}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """The state of `as_dict`, packed or not. Names may have prefixes, such as "weight.".

        Raises ValueError for what is none.
        """
        found: dict[str, Any] = {}
        for name, value in qs_dict.items():
            if "bitsandbytes__" in name:
                found |= json.loads(bytes(value.tolist()))
            else:
                found[name.rpartition(".")[2]] = value
        lacking = {"quant_type", "absmax", "blocksize", "quant_map", "dtype"} - found.keys()
        if lacking:
            raise ValueError(f"the state lacks {sorted(lacking)}; give all entries of QuantState.as_dict")
        offset, state2 = None, None
        if "nested_absmax" in found:
            offset = torch.tensor(float(found["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                found["nested_absmax"].to(device),
                code=found["nested_quant_map"].to(device),
                blocksize=found["nested_blocksize"],
                dtype=getattr(torch, found["nested_dtype"]),
            )
        return cls(
            found["absmax"].to(device),
            found.get("shape"),
            found["quant_map"].to(device),
            found["blocksize"],
            found["quant_type"],
            getattr(torch, found["dtype"]),
            offset,
            state2,
        )

    def to(self, device: torch.device | str) -> QuantState:
        """Move the tensors to `device`, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self


def is_state_name(name: str) -> bool:
    """Whether an entry of a state dict, without the parameter's name, belongs to a packed state."""
    return name in _TENSORS or name.startswith(_PACKED)
