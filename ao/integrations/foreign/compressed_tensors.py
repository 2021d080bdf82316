"""compressed-tensors (llm-compressor): integers and floats of several layouts, each group of layers with its own.

    pack-quantized   weight_packed int32 (N, words): codes q + 2**(bits - 1), a stream along K; weight_shape; weight_scale (N, G);
                     weight_zero_point int32, packed along N, if asymmetric; weight_g_idx with activation order
    int-quantized, naive-quantized   weight int8, weight_scale, weight_zero_point, input_scale
    float-quantized  weight float8_e4m3fn, weight_scale: (1,), (N, 1) or one per block; input_scale
    nvfp4-pack-quantized   weight_packed uint8 (N, K / 2), weight_scale e4m3 (N, K / 16), weight_global_scale, which divides
    mxfp4-pack-quantized   weight_packed uint8, weight_scale uint8: exponents
    mxfp8-quantized        weight e4m3, weight_scale uint8

Up to version 0.17 a word of pack-quantized codes held 32 // bits of them, since 0.18 codes go on in the next word. These differ
for 3, 5, 6 and 7 bits, and `version` in the config decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...dtypes import Float8, Intx, QTensor, Spec
from ...dtypes.permuted import Permuted, stored_order
from .fp8 import float8
from .reader import Reader, Source, integers, with_activation
from .small_floats import mxfp4, mxfp8, nvfp4
from .words import from_words


class CompressedTensors(Reader):
    """See the module."""

    methods = ("compressed-tensors",)
    main = "weight_scale"
    others = (
        "weight",
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
    )
    integers = ("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")
    floats = ("weight_global_scale", "input_scale")

    def group_of(self, module: str) -> Mapping[str, Any]:
        """The group of `config_groups` that a layer belongs to. A target is "re:" and a pattern, a name, or the name of a class,
        which is taken where no other fits."""
        groups = list(self.config.get("config_groups", {}).values())
        for group in groups:
            for target in group.get("targets", ()):
                name = target.removeprefix("re:")
                if target == module or (target.startswith("re:") and re.match(name, module)):
                    return dict(group)
        classes = [g for g in groups if any(not t.startswith("re:") and "." not in t for t in g.get("targets", ()))]
        if len(classes) != 1:
            raise ValueError(f"{len(classes)} groups of config_groups fit the layer {module!r}")
        return dict(classes[0])

    def make(self, source: Source, parts: dict[str, Tensor], dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        group = self.group_of(source.module)
        weights = group["weights"]
        form = group.get("format") or self.config.get("format", "")
        act, act_scale = _activation(group.get("input_activations"), parts)
        if form == "pack-quantized":
            made = self._packed(parts, int(weights["num_bits"]), dtype)
        elif form in ("int-quantized", "naive-quantized") and weights.get("type", "int") == "int":
            zeros = parts.get("weight_zero_point")
            made = _integers(parts["weight"], parts["weight_scale"], zeros, int(weights["num_bits"]), dtype)
        elif form in ("float-quantized", "naive-quantized"):
            made = float8(parts["weight"], parts["weight_scale"], dtype, block=weights.get("block_structure"))
        elif form == "nvfp4-pack-quantized":
            made = nvfp4(parts["weight_packed"], parts["weight_scale"], 1 / parts["weight_global_scale"].float(), dtype)
        elif form == "mxfp4-pack-quantized":
            made = mxfp4(parts["weight_packed"], parts["weight_scale"], dtype)
        elif form == "mxfp8-quantized":
            made = mxfp8(parts["weight"], parts["weight_scale"], dtype)
        else:
            raise ValueError(f"format {form!r} is none that is read")
        return with_activation(made, act, act_scale)

    def _packed(self, parts: dict[str, Tensor], bits: int, dtype: torch.dtype) -> QTensor:
        rows, inputs = (int(n) for n in parts["weight_shape"])
        padded = _version(self.config.get("version", "")) < (0, 18)
        codes = from_words(parts["weight_packed"], bits, inputs, padded=padded)  # (N, K), q + 2**(bits - 1)
        signed = codes.to(torch.int16) - 2 ** (bits - 1)
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32 and zeros.shape != parts["weight_scale"].shape:
            zeros = from_words(zeros.t().contiguous(), bits, rows, padded=padded).t().to(torch.int16) - 2 ** (bits - 1)
        if "weight_g_idx" not in parts:
            return _integers(signed, parts["weight_scale"], zeros, bits, dtype)
        order = torch.argsort(parts["weight_g_idx"].long(), stable=True)
        values = _integers(signed[:, order], parts["weight_scale"], zeros, bits, torch.float32)
        return Permuted(values.spec).wrap({"qdata": values, "order": stored_order(order)}, dtype, values.shape)


def _in_grid(t: Tensor, codes: Tensor) -> Tensor:
    """One per tensor, row, or group, stored in any shape -> (1, 1), (N, 1) or (N, G)."""
    return t.reshape(1, 1) if t.numel() == 1 else t.reshape(codes.shape[0], -1)


def _integers(codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype) -> QTensor:
    return integers(codes, _in_grid(scale, codes), None if zeros is None else _in_grid(zeros, codes), bits, dtype)


def _activation(given: Mapping[str, Any] | None, parts: dict[str, Tensor]) -> tuple[Spec | None, Tensor | None]:
    """The Spec of the activations of a layer, and the scale of static ones."""
    if not given:
        return None, None
    bits, kind = int(given["num_bits"]), given.get("type", "int")
    if bits == 4 and kind == "float":
        return None, None  # NVFP4 activations: the weight is what is stored; computed in floating point
    if bits != 8:
        raise ValueError(f"activations of {bits} bits")
    static = given.get("dynamic") is False
    if static and (zero := parts.get("input_zero_point")) is not None and bool((zero != 0).any()):
        raise ValueError("static activations with zero points")
    block = (-1, -1) if static or given.get("strategy") == "tensor" else (1, -1)
    if given.get("strategy") in ("group", "block") and given.get("group_size"):
        block = (1, int(given["group_size"]))
    symmetric = bool(given.get("symmetric", True))
    act: Spec = Float8("e4m3", block) if kind == "float" else Intx(8, block, symmetric=symmetric)
    return act, parts["input_scale"].float().reshape(1, 1) if static else None


def _version(text: str) -> tuple[int, ...]:
    """(0, 17) of "0.17.1.a20260101"; what is missing is new."""
    numbers = re.findall(r"\d+", text)[:2]
    return tuple(map(int, numbers)) if len(numbers) == 2 else (99,)
