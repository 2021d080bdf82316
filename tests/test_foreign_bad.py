"""Tensors that are missing, cut, or of another type: every reader says which parameter, and gives none."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_foreign import ARRAYS, array, gptq_parts
from test_foreign_folders import awq, blocks_of_float8, gptq, packed
from torch import Tensor

from ao.integrations.foreign.reader import Source, reader_for

Example = tuple[dict[str, Any], dict[str, Tensor], dict[str, str], tuple[int, ...]]
"""A quantization_config, the tensors of a weight by part, the metadata of its file, and its shape."""


def w(rows: int = 64, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _gptq() -> Example:
    return {"quant_method": "gptq", "bits": 4}, gptq(w())[0], {}, (64, 128)


def _gptq3() -> Example:
    return {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"}, gptq_parts(3)[0], {}, (32, 64)


def _awq() -> Example:
    return {"quant_method": "awq"}, awq(w())[0], {}, (64, 128)


def _compressed(form: str, parts: dict[str, Tensor], bits: int = 8, kind: str = "int") -> Example:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind}, "format": form}
    return {"quant_method": "compressed-tensors", "config_groups": {"0": group}}, parts, {}, (64, 128)


def _int_quantized() -> Example:
    codes = torch.randint(-128, 128, (64, 128)).to(torch.int8)
    return _compressed("int-quantized", {"weight": codes, "weight_scale": torch.rand(64, 1)})


def _nvfp4_parts(second: str) -> dict[str, Tensor]:
    name = "weight_packed" if second == "weight_global_scale" else "weight"
    octets = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    scale = torch.rand(64, 8).to(torch.float8_e4m3fn)
    return {name: octets, "weight_scale": scale, second: torch.tensor([0.5])}


def _bitsandbytes() -> Example:
    given = ARRAYS["bnb_nf4_dq"]
    parts = {"weight": array(given["packed"]).view(given["packed_shape"])}
    for key, text in given["state"].items():
        octets = "quant_state" in key or key == "absmax"
        parts["state" if "quant_state" in key else key] = array(text, torch.uint8 if octets else torch.float32)
    state = json.loads(bytes(parts["state"].tolist()))
    return {"quant_method": "bitsandbytes"}, parts, {}, tuple(state["shape"])


def _bitsandbytes_int8() -> Example:
    codes = torch.randint(-127, 128, (64, 128)).to(torch.int8)
    return {"quant_method": "bitsandbytes"}, {"weight": codes, "SCB": torch.rand(64)}, {}, (64, 128)


def _hqq() -> Example:
    parts = {"W_q": torch.randint(0, 256, (64, 64), dtype=torch.uint8), "scale": torch.rand(128, 1)}
    parts |= {"zero": torch.rand(128, 1), "nbits": torch.tensor(4), "shape": torch.tensor([64, 128])}
    return {"quant_method": "hqq"}, parts, {}, (64, 128)


def _quanto() -> Example:
    parts = {"weight._data._data": torch.randint(0, 256, (64, 64), dtype=torch.uint8)}
    parts |= {"weight._scale": torch.rand(128, 1), "weight._shift": torch.rand(128, 1)}
    return {"quant_method": "quanto", "weights": "int4"}, parts, {}, (64, 128)


def _fp8() -> Example:
    return {"quant_method": "fp8", "weight_block_size": [32, 32]}, blocks_of_float8(w())[0], {}, (64, 128)


def _gpt_oss() -> Example:
    blocks = torch.randint(0, 256, (2, 64, 4, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 64, 4), dtype=torch.uint8)
    return {"quant_method": "mxfp4"}, {"_blocks": blocks, "_scales": scales}, {}, (2, 128, 64)


def _torchao(kind: str, fields: dict[str, Tensor], **data: Any) -> Example:
    entry = {"_type": kind, "_data": data, "_tensor_data_names": list(fields)}
    return {"quant_method": "torchao"}, fields, {"a.weight": json.dumps(entry)}, (64, 128)


EXAMPLES: dict[str, Example] = {
    "gptq": _gptq(),
    "gptq-3": _gptq3(),
    "awq": _awq(),
    "compressed-tensors-packed": _compressed("pack-quantized", packed(w())[0], 4),
    "compressed-tensors-int": _int_quantized(),
    "compressed-tensors-nvfp4": _compressed("nvfp4-pack-quantized", _nvfp4_parts("weight_global_scale"), 4, "float"),
    "bitsandbytes-nf4": _bitsandbytes(),
    "bitsandbytes-int8": _bitsandbytes_int8(),
    "hqq": _hqq(),
    "quanto": _quanto(),
    "fp8": _fp8(),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _nvfp4_parts("weight_scale_2"), {}, (64, 128)),
    "gpt-oss": _gpt_oss(),
    "torchao-int8": _torchao(
        "Int8Tensor",
        {"qdata": torch.randint(-128, 128, (64, 128)).to(torch.int8), "scale": torch.rand(64, 1)},
        block_size=[1, 128],
    ),
    "torchao-nvfp4": _torchao(
        "NVFP4Tensor",
        {
            "qdata": torch.randint(0, 256, (64, 64), dtype=torch.uint8),
            "scale": torch.rand(64, 8).to(torch.float8_e4m3fn),
        },
        block_size=16,
    ),
}

OPTIONAL = {
    ("gptq", "g_idx"),  # groups are in order without it
    ("compressed-tensors-packed", "weight_shape"),
}


EITHER = {("quanto", "weight._shift")}
"""Integers mean something else than floating-point numbers, and both are read."""


def read(example: Example, parts: dict[str, Tensor], shape: Any) -> Tensor:
    config, _, metadata, _ = example
    reader = reader_for(config, metadata)
    if metadata:
        list(reader.sources(()))
    source = Source("a.weight", {name: name for name in parts})
    return reader.read(source, parts.__getitem__, torch.float32, torch.Size(shape))


def mutations(t: Tensor) -> dict[str, Tensor]:
    """What a part may be in place of what it should be."""
    found = {"of another type": t.to(torch.int32) if t.is_floating_point() else t.float()}
    found["with another dim"] = t.unsqueeze(0)
    for d in range(t.dim()):
        if t.shape[d] > 2:
            found[f"cut along {d}"] = t.narrow(d, 0, t.shape[d] - 1).contiguous()
            found[f"half along {d}"] = t.narrow(d, 0, t.shape[d] // 2).contiguous()
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_part(name):
    example = EXAMPLES[name]
    _, parts, _, shape = example
    good = read(example, parts, shape).dequantize()
    assert good.shape == shape
    for part, t in parts.items():
        if t.numel() == 1 or part in ("state", "shape", "weight_shape"):
            continue
        changed = {"missing": {n: p for n, p in parts.items() if n != part}}
        changed |= {how: {**parts, part: other} for how, other in mutations(t).items()}
        if (name, part) in EITHER:
            changed.pop("of another type")
        for how, bad in changed.items():
            if (name, part) in OPTIONAL and how == "missing":
                assert torch.equal(read(example, bad, shape).dequantize(), good)
                continue
            try:
                made = read(example, bad, shape)
            except ValueError as error:
                assert str(error).startswith("a.weight: cannot read its "), (part, how, error)
                continue
            same = how == "with another dim" and torch.equal(made.dequantize(), good)
            assert same, f"{part} {how} was read as {made.spec}"
