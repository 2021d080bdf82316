"""torchao's safetensors: arrays that torchao 0.18 made (foreign_arrays.json), layouts that only GPUs write, whole folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import save_file
from test_foreign import ARRAYS, array
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ao
from ao.dtypes import NVFP4, Float8, Intx, QTensor, Shifted
from ao.integrations.foreign.checkpoint import ForeignCheckpoint
from ao.integrations.foreign.convert import convert_folder
from ao.integrations.transformers import AoConfig

SPECS: dict[str, Any] = {
    "int8": Intx(8),
    "int8_groups": Intx(8, (1, 32)),
    "int8_dynamic": Intx(8, act=Intx(8, symmetric=False)),
    "int4": Intx(4, (1, 32), symmetric=True, scale_dtype="bfloat16"),
    "int3": Intx(3, (1, 32), scale_dtype="bfloat16"),
    "8da4w": Intx(4, (1, 32), symmetric=True, scale_dtype="bfloat16", act=Intx(8, symmetric=False)),
    "float8": Float8(),
    "float8_tensor": Float8(block=(-1, -1)),
    "nvfp4": NVFP4,
    "nvfp4_one_level": None,
    "mxfp8": None,
    "mxfp4": None,
}


def read(metadata: dict[str, str], tensors: dict[str, Tensor], name: str = "0.weight") -> Any:
    """The weight that is stored in these tensors."""
    checkpoint = ForeignCheckpoint({"quant_method": "torchao"}, tensors, metadata)
    return checkpoint.make(name, tensors.__getitem__, torch.bfloat16)


def described(kind: str, fields: dict[str, Tensor], **data: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a weight called 0.weight."""
    entry = {"_type": kind, "_data": data, "_tensor_data_names": list(fields)}
    return {"0.weight": json.dumps(entry)}, {f"0._weight_{name}": t for name, t in fields.items()}


@pytest.mark.parametrize("name", SPECS)
def test_arrays(name):
    given = ARRAYS[f"torchao_{name}"]
    tensors = {
        f"0._weight_{field}": array(text, getattr(torch, dtype), shape)
        for field, (text, dtype, shape) in given["parts"].items()
    }
    q = read({"0.weight": given["metadata"]}, tensors)
    assert torch.equal(q.dequantize(), array(given["dequant_bf16"], torch.bfloat16, (16, 64)))
    assert SPECS[name] is None or q.spec == SPECS[name]
    assert q.nbytes_packed <= sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("rows", [40, 160])
def test_swizzled_scales(rows):
    """More than a tile of 128 rows and 4 columns, and neither full."""
    scale = torch.rand(rows, 6).to(torch.float8_e4m3fn)
    tiles = torch.zeros(-(-rows // 128), 2, 512, dtype=torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(6):
            tiles[r // 128, c // 4, r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    octets = torch.randint(0, 256, (rows, 48), dtype=torch.uint8)
    fields = {"qdata": octets, "scale": tiles.reshape(-1, 32)}
    q = read(*described("NVFP4Tensor", fields, block_size=16, is_swizzled_scales=True))
    plain = read(*described("NVFP4Tensor", {**fields, "scale": scale}, block_size=16, is_swizzled_scales=False))
    assert torch.equal(q.scale.view(torch.uint8), scale.view(torch.uint8)) and torch.equal(q.decode(), plain.decode())


def int4(zeros: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (16, 256) from 0 to 15, scale and zero (16, 4), and what they stand for."""
    codes = torch.randint(0, 16, (16, 256), dtype=torch.uint8)
    scale, zero = torch.rand(16, 4).bfloat16(), (torch.randn(16, 4) if zeros else torch.zeros(16, 4)).bfloat16()
    blocks = codes.unflatten(1, (4, 64)).double()
    dense = (blocks - 8) * scale.double()[..., None] + zero.double()[..., None]
    return codes, scale, zero, dense.flatten(1).float()


@pytest.mark.parametrize("zeros", [True, False])
def test_int4_rows(zeros):
    codes, scale, zero, dense = int4(zeros)
    signed = codes ^ 8
    fields = {
        "qdata": (signed[:, ::2] | (signed[:, 1::2] << 4)).view(torch.int8),
        "scale": scale.t().contiguous(),
        "zero_point": zero.t().contiguous(),
    }
    q = read(*described("Int4Tensor", fields, block_size=[1, 64], shape=[16, 256]))
    assert torch.equal(q.decode(), dense)
    common = {"block": (1, 64), "scale_dtype": "bfloat16"}
    assert q.spec == (Shifted(4, centered=True, **common) if zeros else Intx(4, symmetric=True, **common))
    assert q.nbytes_packed == sum(t.nbytes for t in fields.values()) - (0 if zeros else zero.nbytes)


def test_int4_words():
    codes, scale, _, _ = int4()
    zero = torch.randint(0, 16, (16, 4))
    octets = codes[:, ::2] | (codes[:, 1::2] << 4)
    fields = {"qdata": octets.contiguous().view(torch.int32), "scale": scale.t().contiguous()}
    fields["zero_point"] = zero.t().contiguous().to(torch.int8)
    q = read(*described("Int4PlainInt32Tensor", fields, block_size=[1, 64], shape=[16, 256]))
    expected = (codes.unflatten(1, (4, 64)).int() - zero[..., None]).float() * scale.float()[..., None]
    assert torch.equal(q.decode(), expected.flatten(1)) and q.spec == Intx(4, (1, 64), scale_dtype="bfloat16")
    fields["zero_point"] = fields["zero_point"].bfloat16()
    with pytest.raises(ValueError, match="the layout of an NPU"):
        read(*described("Int4PlainInt32Tensor", fields, block_size=[1, 64], shape=[16, 256]))


def tiled(codes: Tensor) -> Tensor:
    """Word t of a tile of 8 rows and 128 columns, as the tensor cores' B operand has them: two columns next to each other of
    row t // 4, and those 8, 16, 24 columns on; the first of each pair in the low half of the word."""
    words = torch.zeros(codes.shape[0] // 8, codes.shape[1] // 128, 32, 4, dtype=torch.int64)
    for t in range(32):
        for inner in range(4):
            for pair in range(4):
                column = 32 * inner + 8 * pair + 2 * (t % 4)
                for high in range(2):
                    part = codes[t // 4 :: 8, column + high :: 128].long()
                    words[:, :, t, inner] |= part << (16 * high + 4 * pair)
    return words.to(torch.uint32).view(torch.int32)


def test_int4_tiles():
    codes, scale, zero, dense = int4()
    padded = torch.nn.functional.pad(codes, (0, 768))
    pairs = torch.nn.functional.pad(torch.stack([scale.t(), zero.t()], -1), (0, 0, 0, 0, 0, 12))
    fields = {"qdata": tiled(padded), "scale_and_zero": pairs}
    q = read(*described("Int4TilePackedTo4dTensor", fields, block_size=[1, 64], shape=[16, 256]))
    assert torch.equal(q.decode(), dense)


@pytest.mark.gpu
def test_int4_tiles_of_a_gpu():
    codes = torch.randint(0, 16, (16, 1024), dtype=torch.uint8)
    words = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).cuda(), 8)
    assert torch.equal(words.cpu(), tiled(codes))


def test_activations():
    codes, scale = torch.randint(-128, 128, (8, 64)).to(torch.int8), torch.rand(8, 1)
    pre, given = torch.rand(64), torch.tensor([[0.125]])
    fields = {"qdata": codes, "scale": scale, "act_quant_scale": given, "act_pre_scale": pre}
    q = read(*described("Int8Tensor", fields, block_size=[1, 64]))
    assert q.spec.act == Intx(8, (-1, -1)) and q.act_scale.item() == 0.125
    assert torch.allclose(q.dequantize().float(), codes * scale * pre, rtol=2**-8)
    zeros = {**fields, "act_quant_zero_point": torch.ones(1, 1, dtype=torch.int8)}
    with pytest.raises(ValueError, match="static activations with zero points"):
        read(*described("Int8Tensor", zeros, block_size=[1, 64]))
    kwargs = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {"granularity": {"_type": "PerTensor", "_data": {}}}}
    fields = {"qdata": torch.randn(8, 64).to(torch.float8_e4m3fn), "scale": scale}
    q = read(*described("Float8Tensor", fields, act_quant_kwargs=kwargs))
    assert q.spec == Float8(act=Float8(block=(-1, -1)))


def test_what_is_not_read():
    fields = {"qdata": torch.zeros(8, 64, dtype=torch.int8), "scale": torch.ones(8, 1)}
    for kind, data, why in (
        ("Int4PreshuffledTensor", {}, "its class is Int4PreshuffledTensor; those that are read are Int8Tensor"),
        ("MXTensor", {"elem_dtype": "fp6_e2m3", "block_size": 32}, "elements of fp6_e2m3"),
        ("Int8Tensor", {"act_quant_kwargs": {"_type": "Other", "_data": {}}}, "activations that Other describes"),
    ):
        with pytest.raises(ValueError, match=rf"0\.weight: cannot read its torchao tensors .*{why}"):
            read(*described(kind, fields, **data))
    metadata, tensors = described("Int8Tensor", fields)
    with pytest.raises(ValueError, match=r"0\.weight: cannot read.*'scale'"):
        read(metadata, {"0._weight_qdata": fields["qdata"]})
    with pytest.raises(ValueError, match="scales of shape .* do not fit"):
        read(metadata, {**tensors, "0._weight_scale": torch.ones(3, 1)})
    with pytest.raises(ValueError, match="metadata of the files, and these have none"):
        read({"format": "pt"}, tensors)


def make(folder: Path) -> nn.Module:
    """A Llama as torchao saves it, int8 per row, in two files; and the model that it decodes to."""
    torch.manual_seed(0)
    model = hf_models.llama().bfloat16().eval()
    metadata, stored = {"format": "pt"}, dict[str, Tensor]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("_proj.weight"):
                stored[name], metadata[name] = p.detach().clone(), '{"_type": "Tensor"}'
                continue
            scale = p.float().abs().amax(1, keepdim=True) / 127
            codes = (p.float() / scale).round().to(torch.int8)
            p.copy_(codes * scale)
            layer = name.removesuffix("weight")
            stored |= {f"{layer}_weight_qdata": codes, f"{layer}_weight_scale": scale}
            described_as = {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "scale"]}
            metadata[name] = json.dumps(described_as)
    metadata["tensor_names"] = json.dumps([n for n, _ in model.named_parameters()])
    folder.mkdir()
    first = sorted(stored)[: len(stored) // 2]
    places = {}
    for i, names in enumerate((first, stored.keys() - first), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: stored[n] for n in names}, folder / file, metadata=metadata)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    settings = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    quantization = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))
    return model


def test_folder(tmp_path):
    dense = make(tmp_path / "theirs")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    convert_folder(tmp_path / "theirs", tmp_path / "ours")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, p in dense.named_parameters():
        for model in (loaded, converted):
            mine = model.get_parameter(name)
            assert isinstance(mine, QTensor) == name.endswith("_proj.weight")
            assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, p), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_package(tmp_path):
    """Folders that transformers and torchao write hold what they decode to, and take the bytes of their files."""
    quantization = pytest.importorskip("torchao.quantization")
    mx = pytest.importorskip("torchao.prototype.mx_formats")
    from transformers import TorchAoConfig

    hf_models.llama(hidden_size=128, intermediate_size=512).bfloat16().save_pretrained(tmp_path / "plain")
    for name, config in {
        "int8": quantization.Int8WeightOnlyConfig(),
        "float8": quantization.Float8WeightOnlyConfig(),
        "nvfp4": mx.NVFP4WeightOnlyConfig(),
    }.items():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=TorchAoConfig(config)
        ).eval()
        theirs.save_pretrained(tmp_path / name)
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=AoConfig("as_stored")).eval()
        for key, p in theirs.named_parameters():
            mine = ours.get_parameter(key)
            assert torch.equal(mine.dequantize(), p.dequantize()) if isinstance(mine, QTensor) else torch.equal(mine, p)
        size = (tmp_path / name / "model.safetensors").stat().st_size
        assert ours.get_memory_footprint() <= size
        words = [m.generate(hf_models.IDS, max_new_tokens=8, do_sample=False) for m in (ours, theirs)]
        assert torch.equal(*words)
        with torch.no_grad():
            assert ao.compute_error(theirs(hf_models.IDS).logits, ours(hf_models.IDS).logits) > 30
