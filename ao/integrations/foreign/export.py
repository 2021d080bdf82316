"""A folder of ours in a form that serving engines read without us: compressed-tensors, or GPTQ.

Only what maps exactly is written, with two exceptions, which the report names: GPTQ's scales are float16, and NVFP4 layers that
engines join share a second scale, stored as its inverse in float32. What does not map is refused before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...dtypes import Float8, FloatX, Intx, QTensor, Spec, dense, packed_dim, unpack
from ...dtypes.checkpoint import quantized_entries, stored_names, unflatten
from ...quant import Report, is_linear
from ...quant.report import Row
from ..command_line.safetensors_header import weight_files
from ..model_folder import read_config, skeleton
from ..stored_tensors import StoredTensors
from ..target_folder import check_absent
from ..written_folder import written_folder
from .words import to_words

__all__ = ["FORMS", "export_folder"]

FORMS = ("compressed-tensors", "gptq")

Parts = dict[str, Tensor]

_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Layers of one module that serving engines make one layer of, which then has one second scale."""

_BESIDE = {
    "pre_scale": "its recipe scales the channels of the input (awq and smoothquant do; gptq, hqq and clip do not)",
    "act_scale": "its activations have a static scale",
}
"""Fields that change what a layer computes and are no part of its weight."""


def export_folder(
    source: Path,
    target: Path,
    form: Literal["compressed-tensors", "gptq"] = "compressed-tensors",
    *,
    max_shard_bytes: int = 2 * 10**9,
    progress: Callable[[int], object] | None = None,
) -> Report:
    """Write `target`, a folder in the form of another library, with the weights of `source`, a folder of ours.

    form: "compressed-tensors" takes integers of 2 to 8 bits per row or group (pack-quantized), also with 8-bit activations
        (int-quantized), float8 per row or tensor (float-quantized, with a scale per row), NVFP4 (nvfp4-pack-quantized), MXFP4
        (mxfp4-pack-quantized) and MXFP8 (mxfp8-quantized), each layer as it is. Of NVFP4 layers that engines join, such as
        q_proj, k_proj and v_proj, the scales are rounded once more, to float8 under the largest of their second scales. "gptq"
        takes integers of 2, 3, 4 or 8 bits in groups, of one width and group for all layers, and rounds scales to float16.
    max_shard_bytes: of a file. progress: called with the bytes of every stored tensor that is done.

    Raises FileNotFoundError and FileExistsError for wrong folders, and ValueError, with the name of the first, for a folder that
    is not of ours and for a weight that has no such form. Nothing is left behind then.
    """
    if form not in FORMS:
        raise ValueError(f"export_folder: form must be one of {', '.join(FORMS)}, got {form!r}")
    config = read_config(source)
    check_absent(target)
    if (config.get("quantization_config") or {}).get("quant_method") != "ao":
        raise ValueError(f"{source} is no folder that ao has quantized; use `ao quantize` first")
    stored = StoredTensors(weight_files(source), progress)
    entries = {name: entry for metadata in stored.metadata for name, entry in quantized_entries(metadata).items()}
    specs = {name: Spec.from_dict(entry["spec"]) for name, entry in entries.items()}
    for name, entry in entries.items():
        for field, what in _BESIDE.items():
            if field in entry["fields"]:
                raise ValueError(f"{name}: {what}, which {form} has no place for")
    groups = _groups(specs, form)
    fields = {field for name, entry in entries.items() for field in (name, *stored_names(name, entry))}
    report = Report()
    with stored, written_folder(source, target, max_shard_bytes) as shards:
        shared = _shared_scales(specs, stored.get)
        for name, entry in entries.items():
            q = unflatten(name, entry, stored.get)
            assert isinstance(q, QTensor)
            stem = name.removesuffix("weight")
            try:
                parts = _compressed(q, shared.get(name)) if form == "compressed-tensors" else _gptq(q)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            for end, t in parts.items():
                shards.add(stem + end, t)
            after = sum(t.nbytes for t in parts.values())
            report.rows.append(Row(name, tuple(q.shape), repr(q.spec), q.nbytes_packed, after))
        for name in stored.names.keys() - fields:
            shards.add(name, stored.get(name))
        quantized = {name.removesuffix(".weight") for names in groups.values() for name in names}
        linear = {n for n, m in skeleton(source).named_modules() if is_linear(m, n)}
        shards.write_config({**config, "quantization_config": _config(groups, sorted(linear - quantized), form)})
    if form == "gptq":
        report.notes.append("scales are rounded to float16, as GPTQ has them: by at most 2**-11 of their value")
    if shared:
        report.notes.append(
            f"scales of {len(shared)} NVFP4 layers are rounded to float8 under one second scale for all layers that "
            "serving engines join, such as q_proj, k_proj and v_proj"
        )
    return report


def _shared_scales(specs: Mapping[str, Spec], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """NVFP4 weights that an engine joins with others whose second scale is larger -> that one."""
    joined: dict[tuple[str, tuple[str, ...]], dict[str, Tensor]] = {}
    for name, spec in specs.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        for leaves in _JOINED:
            if leaf in leaves and isinstance(spec, FloatX) and spec.scale_spec is not None:
                joined.setdefault((module, leaves), {})[name] = get(f"{name}.scale.scale")
    largest = {name: max(scales.values()) for scales in joined.values() for name in scales}
    return {name: largest[name] for scales in joined.values() for name, t in scales.items() if t < largest[name]}


def _groups(specs: Mapping[str, Spec], form: str) -> dict[str, list[str]]:
    """How a layer is quantized, as JSON -> the layers. Raises ValueError for what has no such form."""
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        try:
            if not name.endswith(".weight"):
                raise ValueError("only the weights of layers are exported, and this is another parameter")
            scheme = _scheme(spec) if form == "compressed-tensors" else _gptq_scheme(spec)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name.removesuffix(".weight"))
    if form == "gptq" and len(groups) > 1:
        one, two = (names[0] for names in list(groups.values())[:2])
        raise ValueError(f"{one} and {two} differ in bits or groups, and GPTQ has the same for all layers")
    return groups


def _scheme(spec: Spec) -> dict[str, Any]:
    """The group of a compressed-tensors config."""
    weights: dict[str, Any] = {"dynamic": False, "observer": "minmax"}
    act = spec.act
    if isinstance(spec, Intx) and spec.bits >= 2 and spec.zero_point == "int":
        by_row = spec.block == (1, -1)
        if not by_row and not (len(spec.block) == 2 and spec.block[0] == 1 and spec.block[1] > 0):
            raise ValueError(f"{spec}: blocks of {spec.block}; rows and groups of a row are exported")
        how = {"strategy": "channel"} if by_row else {"strategy": "group", "group_size": spec.block[1]}
        weights |= {"num_bits": spec.bits, "type": "int", "symmetric": bool(spec.symmetric), **how}
        form = "int-quantized" if act is not None else "pack-quantized"
        if act is not None and (not isinstance(act, Intx) or act.bits != 8 or act.block != (1, -1) or spec.bits != 8):
            raise ValueError(f"{spec}: 8-bit weights with 8-bit dynamic activations are exported, no others")
    elif isinstance(spec, Float8) and spec.format == "e4m3" and spec.block in ((1, -1), (-1, -1)):
        # Also of a scale per tensor: engines join layers, and would round those of different scales anew.
        weights |= {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        form = "float-quantized"
        if act is not None and act not in (Float8("e4m3", (1, -1)), Float8("e4m3", (-1, -1))):
            raise ValueError(f"{spec}: activations of {act} are not exported")
    elif isinstance(spec, FloatX) and (small := _small_floats(spec)):
        if act is not None:
            raise ValueError(f"{spec}: with activations of {act}; its weights alone are exported")
        form, strategy, scale_dtype = small
        weights |= {"num_bits": spec.bits, "type": "float", "symmetric": True, "strategy": strategy}
        weights |= {"group_size": spec.block[1], "scale_dtype": scale_dtype}
    else:
        raise ValueError(f"{spec} has no form in compressed-tensors{_whole(spec)}")
    inputs = None
    if isinstance(act, (Intx, Float8)):
        kind = "int" if isinstance(act, Intx) else "float"
        symmetric = bool(act.symmetric) if isinstance(act, Intx) else True
        strategy = "token" if act.block == (1, -1) else "tensor"
        inputs = {"num_bits": 8, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": True}
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def _small_floats(spec: FloatX) -> tuple[str, str, str] | None:
    """Format, strategy and dtype of the scales of small floats in blocks; None where there is no such format."""
    element = (spec.exponent, spec.mantissa)
    second = spec.scale_spec
    if isinstance(second, Float8) and (second.format, second.block) == ("e4m3", (-1, -1)):
        fits = (element, spec.block) == ((2, 1), (1, 16))
        return ("nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn") if fits else None
    forms = {(2, 1): "mxfp4-pack-quantized", (4, 3): "mxfp8-quantized"}
    fits = spec.scale == "e8m0" and spec.block == (1, 32) and element in forms
    return (forms[element], "group", "torch.uint8") if fits else None


def _whole(spec: Spec) -> str:
    """What to do where zero points are fractions, as recipes have them unless they are told otherwise."""
    if not isinstance(spec, Intx) or spec.zero_point != "float":
        return ""
    return (
        ": its zero points are fractions; quantize with whole ones (zero_point_domain=ZeroPointDomain.INT) or without any, as "
        "'Intx(bits=4, block=(1, 128), symmetric=True)'"
    )


def _gptq_scheme(spec: Spec) -> dict[str, Any]:
    fits = isinstance(spec, Intx) and spec.bits in (2, 3, 4, 8) and spec.zero_point == "int" and spec.act is None
    if not fits or len(spec.block) != 2 or spec.block[0] != 1:
        raise ValueError(
            f"{spec} has no form in GPTQ, which takes integers of 2, 3, 4 or 8 bits per row or group{_whole(spec)}"
        )
    assert isinstance(spec, Intx)
    return {"bits": spec.bits, "group_size": spec.block[1], "sym": bool(spec.symmetric)}


def _config(groups: Mapping[str, list[str]], plain: list[str], form: str) -> dict[str, Any]:
    if form == "gptq":
        (scheme,) = map(json.loads, groups)
        whole: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in plain if name != "lm_head"}
        return {
            "quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False, "lm_head": False, **scheme,
            **({"dynamic": whole} if whole else {}),
        }  # fmt: skip
    schemes = [json.loads(scheme) for scheme in groups]
    targets = [["Linear"]] if len(groups) == 1 else list(groups.values())
    forms = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": {"targets": t, **s} for i, (t, s) in enumerate(zip(targets, schemes))},
        "ignore": plain,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "version": "0.18.0",
    }


def _codes(q: Any) -> tuple[Tensor, Tensor | None]:
    """Codes and zero points of an integer weight as unsigned numbers from 0 to 2**bits - 1: (N, K), (N, G)."""
    middle = 2 ** (q.spec.bits - 1)
    codes = unpack(q.qdata, q.spec.bits, packed_dim(q.qdata.shape, q.shape))
    if q.spec.bits == 8 and q.spec.signed:
        codes = (codes.view(torch.uint8) ^ 128).contiguous()
    if q.zero_point is None:
        return codes, None
    return codes, (q.zero_point.to(torch.int16) + (middle if q.spec.signed else 0)).to(torch.uint8)


def _compressed(q: Any, shared: Tensor | None) -> Parts:
    """The tensors of a weight in compressed-tensors' form. shared: a second scale for NVFP4 in place of its own."""
    spec = q.spec
    if isinstance(spec, Float8):
        return {"weight": q.qdata, "weight_scale": q.scale.expand(q.shape[0], 1).contiguous()}
    if isinstance(spec, FloatX) and spec.bits == 8:
        return {"weight": q.qdata.view(torch.float8_e4m3fn), "weight_scale": q.scale.qdata}
    if isinstance(spec, FloatX):
        codes = unpack(q.qdata, 4, packed_dim(q.qdata.shape, q.shape))
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        if spec.scale_spec is None:
            return {"weight_packed": packed, "weight_scale": q.scale.qdata}
        second, scale = q.scale.scale, q.scale.qdata
        if shared is not None:
            second, scale = shared, (scale.float() * (second / shared)).to(scale.dtype)
        inverse = torch.where(second > 0, 1 / second, 1.0)  # of zeros, any
        return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": inverse.reshape(1)}
    codes, zeros = _codes(q)
    middle = 2 ** (spec.bits - 1)
    if spec.act is not None:
        parts = {"weight": (codes.to(torch.int16) - middle).to(torch.int8), "weight_scale": dense(q.scale)}
        return (
            parts if zeros is None else {**parts, "weight_zero_point": (zeros.to(torch.int16) - middle).to(torch.int8)}
        )
    parts = {
        "weight_packed": to_words(codes, spec.bits),
        "weight_scale": dense(q.scale),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64, device="cpu"),
    }
    if zeros is not None:
        parts["weight_zero_point"] = to_words(zeros.t().contiguous(), spec.bits).t().contiguous()
    return parts


def _gptq(q: Any) -> Parts:
    """The tensors of a weight in GPTQ's second form."""
    codes, zeros = _codes(q)
    bits, groups = q.spec.bits, q.scale.shape[1]
    if (codes.shape[1] * bits) % 32 or (codes.shape[0] * bits) % 32:
        raise ValueError(f"a weight of shape {tuple(q.shape)} in {bits} bits fills no whole words, as GPTQ needs")
    zeros = torch.full(q.scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device="cpu") if zeros is None else zeros
    scales = dense(q.scale).half()
    if not scales.isfinite().all() or bool(((scales == 0) & (q.scale != 0)).any()):
        raise ValueError("float16, in which GPTQ has its scales, does not hold those of this weight")
    return {
        "qweight": to_words(codes, bits).t().contiguous(),
        "qzeros": to_words(zeros.t().contiguous(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(codes.shape[1], device="cpu") // (codes.shape[1] // groups)).int(),
    }
