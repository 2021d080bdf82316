"""torchao's safetensors: tensor subclasses taken apart, and a description of each in the metadata of the file.

<layer>._<parameter>_<field>   one tensor per field: qdata, scale, zero_point, scale_and_zero, per_tensor_scale, ...
metadata[<layer>.<parameter>]  JSON: `_type`, the class; `_data`, its other attributes; `_tensor_data_names`, its fields

Int8Tensor, IntxUnpackedToInt8Tensor   qdata int8: (q - zero_point) * scale
Float8Tensor               qdata e4m3 or e5m2: q * scale
Int4Tensor                 qdata uint8 (N, K / 2), low nibble first, signed; scale, zero_point (G, N): q * scale + zero_point
Int4TilePackedTo4dTensor   qdata int32 in the tiles of `torch._weight_int4pack_mm`; scale_and_zero (G, N, 2):
                           (q - 8) * scale + zero; rows filled up to 8, columns to 1024
Int4PlainInt32Tensor       qdata int32 (N, K / 8), low nibble first; scale, zero_point (G, N): (q - zero_point) * scale
MXTensor, NVFP4Tensor      scales swizzled for Blackwell where `is_swizzled_scales`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...dtypes import MXFP4, MXFP8, NVFP4, Float8, FloatX, Intx, QTensor, Shifted, Spec, pack, pack_dim
from .reader import Reader, Source, blocks_of, integers, with_activation
from .small_floats import mxfp4, mxfp8, nvfp4
from .words import from_words

Parts = dict[str, Tensor]


class TorchAO(Reader):
    """See the module."""

    methods = ("torchao",)
    main = ""
    floats = ("scale", "scale_and_zero", "per_tensor_scale", "act_pre_scale", "act_quant_scale")

    def sources(self, names: Collection[str]) -> Iterator[Source]:
        self.entries: dict[str, dict[str, Any]] = {}
        for parameter, text in self.metadata.items():
            entry = _entry(text)
            if entry is None:
                continue
            self.entries[parameter] = entry
            layer, _, leaf = parameter.rpartition(".")
            stored = {field: f"{layer}._{leaf}_{field}" for field in entry["_tensor_data_names"]}
            yield Source(parameter, {field: name for field, name in stored.items() if name in names})
        if not self.entries:
            raise ValueError(
                "torchao describes its tensors in the metadata of the files, and these have none: they were rewritten on the "
                "way, or hold pickled tensors; save the model again with a torchao that writes safetensors"
            )

    def make(self, source: Source, parts: Parts, dtype: torch.dtype, shape: torch.Size | None) -> Tensor:
        entry = self.entries[source.parameter]
        kind, data = entry["_type"], entry["_data"]
        if kind not in _KINDS:
            raise ValueError(f"its class is {kind}; those that are read are {', '.join(_KINDS)}")
        made = _KINDS[kind](parts, data, dtype)
        act = _activation(data.get("act_quant_kwargs"))
        if data.get("activation_quantization") is not None:
            act = Intx(8, (1, -1), symmetric=False)
        if kind == "Int4Tensor" and data.get("activation_dtype") == "float8_e4m3fn":
            act = Float8("e4m3", (1, -1))
        act_scale = parts.get("act_quant_scale")
        if act_scale is not None:
            zero = parts.get("act_quant_zero_point")
            if act_scale.numel() != 1 or (zero is not None and bool((zero != 0).any())):
                raise ValueError("static activations with zero points, or with more than one scale")
            act, act_scale = act or Intx(8, (-1, -1)), act_scale.float().reshape(1, 1)
        made = with_activation(made, act, act_scale)
        if "act_pre_scale" in parts:
            made = made.spec.wrap(
                made.fields() | {"pre_scale": parts["act_pre_scale"].reshape(1, -1)}, dtype, made.shape
            )
        return made


def _entry(text: str) -> dict[str, Any] | None:
    """What the metadata say of a quantized tensor; None for what is not of one. Types and enums are taken by their names."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("_tensor_data_names"), list):
        return None
    return {**found, "_data": {name: _plain(value) for name, value in found.get("_data", {}).items()}}


def _plain(value: Any) -> Any:
    """{"_type": "torch.dtype", "_data": "int4"} -> "int4"; attributes of an object, with its class as "_type"."""
    if isinstance(value, Mapping) and {"_type", "_data"} <= value.keys():
        inner = value["_data"]
        if not isinstance(inner, Mapping):
            return inner
        return {"_type": value["_type"], **{name: _plain(v) for name, v in inner.items()}}
    return value


def _activation(given: Mapping[str, Any] | None) -> Spec | None:
    """The Spec of activations that are quantized at each call."""
    if given is None:
        return None
    kind = given["_type"]
    block = (-1, -1) if given.get("granularity", {}).get("_type") == "PerTensor" else (1, -1)
    if kind == "QuantizeTensorToInt8Kwargs":
        return Intx(8, block, symmetric=given.get("mapping_type", "SYMMETRIC") == "SYMMETRIC")
    if kind == "QuantizeTensorToFloat8Kwargs":
        if given.get("granularity", {}).get("_type") == "PerBlock":
            block = tuple(given["granularity"]["block_size"])
        return Float8(_FLOATS[given.get("float8_dtype", "float8_e4m3fn")], block)
    if kind == "QuantizeTensorToMXKwargs":
        return replace(_mx(given["elem_dtype"], given["block_size"]), scale_rule=given["scaling_mode"].lower())
    if kind == "QuantizeTensorToNVFP4Kwargs":
        return NVFP4 if given.get("use_dynamic_per_tensor_scale") else replace(NVFP4, scale="e4m3", scale_spec=None)
    raise ValueError(f"activations that {kind} describes")


_FLOATS: dict[str, Any] = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def _check_grid(t: Tensor, scale: Tensor, data: Mapping[str, Any]) -> None:
    """Raise ValueError for scales that are not those of the blocks that are told of."""
    block = data.get("block_size")
    if block and [n // b for n, b in zip(t.shape, block)] != list(scale.shape):
        raise ValueError(f"scales of shape {tuple(scale.shape)} are not those of blocks of {block}")


def _int8(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    _check_grid(parts["qdata"], parts["scale"], data)
    return integers(parts["qdata"], parts["scale"], parts.get("zero_point"), 8, dtype)


def _intx(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    _check_grid(parts["qdata"], parts["scale"], data)
    bits = int(data["target_dtype"].removeprefix("int"))
    return integers(parts["qdata"], parts["scale"], parts["zero_point"], bits, dtype)


def _float8(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    qdata, scale = parts["qdata"], parts["scale"].float()
    form = _FLOATS[str(qdata.dtype).removeprefix("torch.")]
    scale = scale.reshape((1,) * qdata.dim()) if scale.numel() == 1 else scale
    _check_grid(qdata, scale, data)
    return Float8(form, blocks_of(qdata.shape, scale)).wrap({"qdata": qdata, "scale": scale}, dtype, qdata.shape)


def _int4(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    octets = parts["qdata"].view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], -1).flatten(-2) ^ 8  # (..., N, K), q + 8
    scale, shift = (parts[name].transpose(-2, -1).contiguous() for name in ("scale", "zero_point"))
    return _centered(codes, scale, shift, dtype)


def _int4_tiles(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    rows, columns = data["shape"]
    tiles = parts["qdata"]  # (rows / 8, columns / (16 t), 32, t / 2) int32, t inner tiles
    nibbles = from_words(tiles.unsqueeze(-1), 4, 8).unflatten(2, (8, 4)).unflatten(-1, (2, 4))
    # Of 8 rows and 32 columns, thread 4 r + c holds row r, columns 2 (4 j + c) + h, in nibble 4 h + j.
    codes = nibbles.permute(0, 2, 1, 4, 6, 3, 5).reshape(8 * tiles.shape[0], -1)[:rows, :columns]
    groups = columns // int(data["block_size"][1])
    pairs = parts["scale_and_zero"][:groups, :rows].transpose(0, 1)  # (N, G, 2)
    scale, shift = (pairs[..., i].contiguous() for i in (0, 1))
    return _centered(codes.contiguous(), scale, shift, dtype)


def _int4_words(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    zeros = parts["zero_point"]
    if zeros.is_floating_point():
        raise ValueError("its zero points are floating-point numbers: the layout of an NPU")
    codes = from_words(parts["qdata"], 4, 8 * parts["qdata"].shape[1])  # (N, K)
    signed, zeros = codes.to(torch.int8) - 8, zeros.t().to(torch.int8) - 8
    return integers(signed, parts["scale"].t().contiguous(), zeros.contiguous(), 4, dtype)


def _centered(codes: Tensor, scale: Tensor, added: Tensor, dtype: torch.dtype) -> QTensor:
    """(codes - 8) * scale + added. codes: (..., K) from 0 to 15. scale, added: (..., G)."""
    if bool((added == 0).all()):
        return integers(codes.to(torch.int8) - 8, scale, None, 4, dtype)
    spec = Shifted(4, blocks_of(codes.shape, scale), centered=True, scale_dtype=str(scale.dtype).removeprefix("torch."))
    qdata = pack(codes, 4, pack_dim(codes.shape, 4))
    return spec.wrap({"qdata": qdata, "scale": scale, "shift": -added}, dtype, codes.shape)


def _mx(element: str, block: int) -> FloatX:
    found = {"float8_e4m3fn": MXFP8, "float8_e5m2": FloatX(5, 2), "float4_e2m1fn_x2": MXFP4}
    if element not in found:
        raise ValueError(f"elements of {element}; {', '.join(found)} are read")
    return replace(found[element], block=(1, block))


def _mx_tensor(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    spec, qdata = _mx(data["elem_dtype"], data["block_size"]), parts["qdata"]
    scale = _scales(parts, data, qdata, 2 if spec.bits == 4 else 1)
    return mxfp4(qdata, scale, dtype, spec) if spec.bits == 4 else mxfp8(qdata, scale, dtype, spec)


def _nvfp4(parts: Parts, data: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    scale = _scales(parts, data, parts["qdata"], 2)
    second = parts.get("per_tensor_scale")
    if second is not None and second.numel() != 1:
        raise ValueError("a second scale for each expert")
    return nvfp4(parts["qdata"], scale, second, dtype)


def _scales(parts: Parts, data: Mapping[str, Any], qdata: Tensor, each: int) -> Tensor:
    """A scale per block, (..., N, G). each: elements in one of `qdata`."""
    scale, rows, groups = parts["scale"], qdata.shape[-2], each * qdata.shape[-1] // int(data["block_size"])
    if not data.get("is_swizzled_scales"):
        return scale
    if qdata.dim() != 2:
        raise ValueError("swizzled scales of more than a matrix")
    # Tiles of 128 rows and 4 columns, row r and column c of one at 16 (r % 32) + 4 (r // 32) + c.
    down, across = -(-rows // 128), -(-groups // 4)
    tiles = scale.view(torch.uint8).reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(128 * down, 4 * across)[:rows, :groups].contiguous().view(scale.dtype)


_KINDS: dict[str, Callable[[Parts, Mapping[str, Any], torch.dtype], QTensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_tiles,
    "Int4PlainInt32Tensor": _int4_words,
    "MXTensor": _mx_tensor,
    "NVFP4Tensor": _nvfp4,
}
"""Class -> what reads its fields and attributes."""
