"""Readers of foreign formats against arrays that the formats' own implementations made (foreign_arrays.json: bytes in hex)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ao
from ao.dtypes import Codebook, Float8, Intx
from ao.integrations.foreign import gguf
from ao.integrations.foreign.awq import AWQ
from ao.integrations.foreign.bitsandbytes import BitsAndBytes
from ao.integrations.foreign.compressed_tensors import CompressedTensors
from ao.integrations.foreign.fp8 import FP8, float8
from ao.integrations.foreign.gptq import GPTQ
from ao.integrations.foreign.hqq import HQQ, hqq_codes
from ao.integrations.foreign.quanto import Quanto
from ao.integrations.foreign.reader import Source, reader_for
from ao.integrations.foreign.small_floats import ModelOpt, MXFP4Experts, nvfp4
from ao.integrations.foreign.words import from_words, to_words

ARRAYS: dict[str, Any] = json.loads((Path(__file__).parent / "foreign_arrays.json").read_text())
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
WEIGHT = Source("layer.weight", {})


def array(text: str, dtype: torch.dtype = torch.uint8, shape: Any = (-1,)) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).view(shape)


@pytest.mark.parametrize("kind", gguf.TYPES)
def test_gguf(kind):
    given = ARRAYS[f"gguf_{kind}"]
    rows = 8 if kind in SUPER_BLOCKS else 1  # codes of scales fill whole bytes then
    q = gguf.tensor_of(kind, array(given["raw"])[None].repeat(rows, 1), torch.float32)
    expected = array(given["dequant_f32"], torch.float32)
    assert torch.equal(q.dequantize(), expected.expand(rows, -1))
    table = 4 * len(q.spec.values) if isinstance(q.spec, Codebook) else 0
    assert q.nbytes_packed - table <= 1.06 * rows * given["bytes"]  # six bits of IQ4_XS's scales take eight


def test_gguf_refuses():
    with pytest.raises(ValueError, match="IQ2_XXS is none of Q4_0"):
        gguf.tensor_of("IQ2_XXS", torch.zeros(1, 66, dtype=torch.uint8), torch.float32)
    with pytest.raises(ValueError, match="no blocks of 18"):
        gguf.tensor_of("Q4_0", torch.zeros(1, 20, dtype=torch.uint8), torch.float32)


def gptq_parts(bits: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    given = ARRAYS[f"gptq_{bits}bit"]
    outputs, inputs, group = given["N"], given["K"], given["group"]
    parts = {
        "qweight": array(given["qweight_i32"], torch.int32, given["qweight_shape"]),
        "qzeros": array(given["qzeros_v2_i32"], torch.int32, given["qzeros_shape"]),
        "scales": array(given["scales_GN_f16"], torch.float16, (inputs // group, outputs)),
    }
    codes = array(given["codes_NK"], shape=(outputs, inputs)).float()
    zeros = array(given["zeros_NG"], shape=(outputs, inputs // group)).float()
    return parts, codes, zeros, parts["scales"].t().float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits, version):
    parts, codes, zeros, scale = gptq_parts(bits)
    if version == "gptq":
        parts["qzeros"] = to_words(((zeros.t() - 1) % 2**bits).to(torch.uint8).contiguous(), bits)
    reader = reader_for({"quant_method": "gptq", "bits": bits, "checkpoint_format": version})
    q = reader.make(WEIGHT, parts, torch.float16, None)
    expected = ((codes.unflatten(1, (-1, 32)) - zeros[..., None]) * scale[..., None]).flatten(1)
    assert q.dtype == torch.float16 and torch.equal(q.decode(), expected)
    assert q.spec == Intx(bits, (1, 32), signed=False, symmetric=False, scale_dtype="float16")


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_in_another_order(bits, tmp_path):
    """desc_act: groups are of inputs that lie anywhere; a product is right, and so is a file of it."""
    parts, codes, zeros, scale = gptq_parts(bits)
    group = (torch.arange(64) // 32)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    config = {"bits": bits, "checkpoint_format": "gptq_v2", "desc_act": True}
    q = GPTQ(config).make(WEIGHT, {**parts, "g_idx": group.int()}, torch.float32, None)
    expected = (codes - zeros[:, group]) * scale[:, group]
    assert torch.equal(q.dequantize(), expected)
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.allclose(F.linear(x, q), F.linear(x, expected), atol=1e-4)
    assert torch.allclose(torch.compile(F.linear, fullgraph=True)(x, q), F.linear(x, expected), atol=1e-4)
    (given,) = torch.autograd.grad(F.linear(x, q).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, expected).square().sum(), x)
    assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-3)
    path = tmp_path / "weight.safetensors"
    ao.save({"weight": q}, path)
    assert torch.equal(ao.load(path)["weight"].dequantize(), expected)
    in_order = GPTQ(config).make(WEIGHT, {**parts, "g_idx": (torch.arange(64) // 32).int()}, torch.float32, None)
    assert isinstance(in_order.spec, Intx)


def test_gptq_symmetric_zero_points_are_not_stored():
    parts, codes, _, scale = gptq_parts(4)
    parts["qzeros"] = to_words(torch.full((2, 32), 8, dtype=torch.uint8), 4)
    q = GPTQ({"bits": 4, "checkpoint_format": "gptq_v2"}).make(WEIGHT, parts, torch.float32, None)
    assert q.spec == Intx(4, (1, 32), symmetric=True, scale_dtype="float16") and q.zero_point is None
    assert torch.equal(q.dequantize(), ((codes.unflatten(1, (-1, 32)) - 8) * scale[..., None]).flatten(1))


def test_awq():
    given = ARRAYS["awq_gemm_4bit"]
    inputs, outputs, group = given["K"], given["N"], given["group"]
    parts = {
        "qweight": array(given["qweight_i32"], torch.int32, given["qweight_shape"]),
        "qzeros": array(given["qzeros_i32"], torch.int32, given["qzeros_shape"]),
        "scales": array(given["scales_GN_f16"], torch.float16, (inputs // group, outputs)),
    }
    q = AWQ({"version": "gemm"}).make(WEIGHT, parts, torch.float32, None)
    codes = array(given["codes_NK"], shape=(outputs, inputs)).float().unflatten(1, (-1, group))
    zeros = array(given["zeros_GN"], shape=(inputs // group, outputs)).float().t()[..., None]
    assert torch.equal(q.dequantize(), ((codes - zeros) * parts["scales"].t().float()[..., None]).flatten(1))
    with pytest.raises(ValueError, match="'gemm' with 4"):
        AWQ({"version": "gemv"}).make(WEIGHT, parts, torch.float32, None)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("version", "key"), [("0.20.0", "dense_0_20"), ("0.17.1", "padded_0_17")])
def test_words_of_compressed_tensors(bits, version, key):
    given = ARRAYS[f"ct_pack_{bits}bit"]
    codes, words = array(given["codes_signed"], torch.int8, given["shape"]), array(given[key], torch.int32)
    words = words.view(given[f"{key}_shape"])
    group = {"targets": ["Linear"], "weights": {"num_bits": bits}}
    reader = CompressedTensors({"format": "pack-quantized", "version": version, "config_groups": {"0": group}})
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)
    parts = {"weight_packed": words, "weight_shape": torch.tensor(given["shape"]), "weight_scale": scale}
    q = reader.make(WEIGHT, parts, torch.float32, None)
    assert torch.equal(q.dequantize(), codes.float() * scale.float())
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    assert torch.equal(to_words(unsigned, bits, padded=version == "0.17.1"), words)


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_nf4_dq", "bnb_fp4", "bnb_fp4_dq"])
def test_bitsandbytes(name):
    given = ARRAYS[name]
    parts = {"weight": array(given["packed"]).view(given["packed_shape"])}
    for key, text in given["state"].items():
        octets = "quant_state" in key or (key == "absmax" and name.endswith("dq"))
        parts["state" if "quant_state" in key else key] = array(text, torch.uint8 if octets else torch.float32)
    q = BitsAndBytes({}).make(WEIGHT, parts, torch.float32, None)
    assert torch.equal(q.dequantize().flatten(), array(given["dequant_f32"], torch.float32))
    assert q.spec.table == name[4:7] and (q.spec.scale_spec is not None) == name.endswith("dq")


def test_bitsandbytes_rows_of_8_bits():
    given = ARRAYS["bnb_int8"]
    scale = array(given["SCB_f32"], torch.float32)
    codes = array(given["CB"], torch.int8, (scale.numel(), -1))
    q = BitsAndBytes({}).make(WEIGHT, {"weight": codes, "SCB": scale}, torch.float32, None)
    assert torch.allclose(q.dequantize(), codes.float() * scale[:, None] / 127, rtol=2e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(bits):
    given = ARRAYS[f"hqq_pack_{bits}"]
    packed = array(given["packed"], torch.int32 if bits == 3 else torch.uint8, given["packed_shape"])
    codes = array(given["codes"], shape=given["shape"])
    assert torch.equal(hqq_codes(packed, bits)[: codes.shape[0]], codes)
    groups = codes.shape[0]
    scale, zero = torch.rand(groups, 1).half(), torch.rand(groups, 1).half()
    parts = {
        "W_q": packed, "scale": scale, "zero": zero, "nbits": torch.tensor(bits), "shape": torch.tensor([groups // 2, 8]),
    }  # fmt: skip
    q = HQQ({}).make(WEIGHT, parts, torch.float32, None)
    assert torch.equal(q.dequantize(), ((codes.float() - zero.float()) * scale.float()).reshape(-1, 8))


def test_quanto():
    given = ARRAYS["quanto_qint4"]
    dtypes = {"weight._data._data": torch.uint8, "weight._scale": torch.float32, "weight._shift": torch.float32}
    parts = {name: array(given["state"][name], dtype, given["shapes"][name]) for name, dtype in dtypes.items()}
    expected = array(given["dequant"], torch.float32).view(16, 64)
    q = Quanto({}).make(WEIGHT, parts, torch.float32, torch.Size((16, 64)))
    assert torch.equal(q.dequantize(), expected)
    rows = {"weight._data": torch.randint(-127, 128, (4, 8)).to(torch.int8), "weight._scale": torch.rand(4, 1)}
    q = Quanto({}).make(WEIGHT, rows, torch.float32, None)
    assert torch.equal(q.dequantize(), rows["weight._data"].float() * rows["weight._scale"])


def test_gpt_oss():
    given = ARRAYS["gpt_oss_mxfp4"]
    parts = {
        "_blocks": array(given["blocks"]).view(given["blocks_shape"]),
        "_scales": array(given["scales"]).view(given["scales_shape"]),
    }
    q = MXFP4Experts({}).make(WEIGHT, parts, torch.float32, None)
    assert torch.equal(q.dequantize(), array(given["out_f32"], torch.float32).view(given["out_shape"]))


def test_nvfp4_of_either_sense():
    """ModelOpt's second scale multiplies, that of compressed-tensors divides: both give the same weight."""
    octets = torch.randint(0, 256, (4, 16), dtype=torch.uint8)
    scale = torch.rand(4, 2).add(0.5).to(torch.float8_e4m3fn)
    second = torch.tensor([0.25])
    parts = {"weight": octets, "weight_scale": scale, "weight_scale_2": second}
    one = ModelOpt({"quant_algo": "NVFP4"}).make(WEIGHT, parts, torch.float32, None)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}, "format": "nvfp4-pack-quantized"}
    parts = {"weight_packed": octets, "weight_scale": scale, "weight_global_scale": 1 / second}
    other = CompressedTensors({"config_groups": {"0": group}}).make(WEIGHT, parts, torch.float32, None)
    assert torch.equal(one.dequantize(), other.dequantize())
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([octets & 15, octets >> 4], -1).flatten(1).int()
    expected = torch.where(codes < 8, values[codes % 8], -values[codes % 8])
    assert torch.equal(
        one.dequantize(), (expected.unflatten(1, (2, 16)) * (scale.float() * second)[..., None]).flatten(1)
    )
    with pytest.raises(ValueError, match="do not fit"):
        nvfp4(octets, scale[:, :1], second, torch.float32)


def test_float8_blocks_that_are_cut_off():
    """576 rows in blocks of 128: the last one has 64."""
    w = torch.randn(192, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2)
    q = FP8({"weight_block_size": [128, 128]}).make(
        WEIGHT, {"weight": w, "weight_scale_inv": scale}, torch.float32, None
    )
    whole = scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    assert torch.equal(q.decode(), w.float() * whole) and q.spec.act == Float8("e4m3", (1, 128))
    for scales in (torch.rand(1), torch.rand(192, 1)):
        assert torch.equal(float8(w, scales, torch.float32).dequantize(), w.float() * scales)
    with pytest.raises(ValueError, match="not those of blocks of"):
        float8(w, torch.rand(3, 2), torch.float32, block=(128, 128))


def test_static_activations():
    w, scale, given = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.tensor(0.5), torch.tensor(0.125)
    q = ModelOpt({"quant_algo": "FP8"}).make(
        WEIGHT, {"weight": w, "weight_scale": scale, "input_scale": given}, torch.float32, None
    )
    assert q.act_scale.item() == 0.125 and q.spec.act == Float8("e4m3", (-1, -1))
    group = {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}, "format": "int-quantized",
        "input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"},
    }  # fmt: skip
    parts = {"weight": torch.randint(-128, 128, (8, 16)).to(torch.int8), "weight_scale": torch.rand(8, 1)}
    q = CompressedTensors({"config_groups": {"0": group}}).make(WEIGHT, parts, torch.float32, None)
    assert q.spec.act == Intx(8, (1, -1))


def test_groups_of_compressed_tensors():
    groups = {
        "a": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 4}},
        "c": {"targets": ["model.layers.0.q_proj"], "weights": {"num_bits": 2}},
    }
    reader = CompressedTensors({"config_groups": groups})
    bits = [reader.group_of(n)["weights"]["num_bits"] for n in ("x.down_proj", "x.up_proj", "model.layers.0.q_proj")]
    assert bits == [8, 4, 2]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("padded", [False, True])
def test_words(bits, padded):
    codes = torch.randint(0, 2**bits, (3, 96), dtype=torch.uint8)
    assert torch.equal(from_words(to_words(codes, bits, padded=padded), bits, 96, padded=padded), codes)
    with pytest.raises(ValueError, match="words hold"):
        from_words(to_words(codes, bits, padded=padded), bits, 300, padded=padded)


def test_bad_tensors_say_which():
    parts, *_ = gptq_parts(4)
    stored = {name: parts[name] for name in ("qweight", "qzeros", "scales")}
    source = Source("a.b.weight", {name: name for name in stored})
    reader = reader_for({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"})
    for name, bad in (("scales", parts["scales"][:, :16]), ("qzeros", parts["qzeros"][:, :1])):
        with pytest.raises(ValueError, match=r"a\.b\.weight: cannot read its gptq tensors \(qweight \(8, 32\) int32"):
            reader.read(source, {**stored, name: bad}.__getitem__, torch.float32)
    with pytest.raises(ValueError, match=r"the model's is \(32, 128\)"):
        reader.read(source, stored.__getitem__, torch.float32, torch.Size((32, 128)))
    with pytest.raises(ValueError, match="ao reads checkpoints of awq, .* and this one is of 'aqlm'"):
        reader_for({"quant_method": "aqlm"})
