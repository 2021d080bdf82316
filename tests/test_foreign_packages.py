"""Folders that the other libraries write: loaded packed, in the memory of their files, with the text of their own decode.

Each runs where its library is installed; CONTRIBUTING.md says how. torchao's is in test_foreign_torchao.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import save_file
from test_foreign_folders import load, write_gguf
from torch import nn
from transformers import PreTrainedTokenizerFast

from ao.dtypes import QTensor
from ao.integrations.foreign.convert import convert_folder
from ao.integrations.foreign.gguf_file import convert_gguf
from ao.integrations.transformers import AoConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Made = tuple[Any, dict[str, Any]]
"""The model with the weights that the library decodes to, in float32; and what loads the folder besides its path."""


def llama() -> Any:
    torch.manual_seed(0)
    return hf_models.llama(hidden_size=256, intermediate_size=512, num_key_value_heads=4).eval()


def write(folder: Path, model: Any, state: dict[str, Any], quantization: dict[str, Any]) -> None:
    """A folder of a state dict."""
    folder.mkdir()
    tensors = {name: t.detach().clone().contiguous() for name, t in state.items() if not name.startswith("lm_head")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": quantization}))


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def hqq(bits: int) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        core = importlib.import_module("hqq.core.quantize")
        model, dense = llama(), llama()
        settings = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        for name, layer in linear_layers(model):
            made = core.HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
            dense.get_submodule(name).weight.data = made.dequantize()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)
        write(folder, model, model.state_dict(), {"quant_method": "hqq"})
        return dense, {}

    return make


def quanto(kind: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        library = importlib.import_module("optimum.quanto")
        model, dense = llama(), llama()
        library.quantize(model, weights=getattr(library, kind), exclude="lm_head")
        library.freeze(model)
        for name, layer in linear_layers(dense):
            layer.weight.data = model.get_submodule(name).weight.dequantize()
        write(folder, model, model.state_dict(), {"quant_method": "quanto", "weights": kind.removeprefix("q")})
        return dense, {}

    return make


def bitsandbytes(**settings: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        functional = importlib.import_module("bitsandbytes").functional
        from transformers import BitsAndBytesConfig

        plain = folder.parent / "plain"
        llama().save_pretrained(plain)
        config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
        model = load(plain, quantization_config=config, device_map="cpu")
        model.save_pretrained(folder)
        dense = llama()
        for name, layer in linear_layers(dense):
            theirs = model.get_submodule(name).weight
            if settings.get("load_in_8bit"):
                layer.weight.data = theirs.CB.float() * theirs.SCB[:, None] / 127
            else:
                layer.weight.data = functional.dequantize_4bit(theirs.data, theirs.quant_state)
        return dense, {}

    return make


def compressed_tensors(preset: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        library = importlib.import_module("compressed_tensors")
        quantization = importlib.import_module("compressed_tensors.quantization")
        config = quantization.QuantizationConfig(
            config_groups={"group_0": quantization.preset_name_to_scheme(preset, ["Linear"])}, ignore=["lm_head"]
        )
        model, dense = llama(), llama()
        quantization.apply_quantization_config(model, config)
        for name, layer in linear_layers(model):
            scheme = layer.quantization_scheme.weights
            w = layer.weight.data
            groups = w if scheme.group_size is None else w.unflatten(1, (-1, scheme.group_size))
            largest = groups.abs().amax(-1, keepdim=True)
            layer.weight_scale.data = (largest / (2 ** (scheme.num_bits - 1) - 1)).reshape(layer.weight_scale.shape)
            layer.quantization_status = quantization.QuantizationStatus.FROZEN
            dense.get_submodule(name).weight.data = quantization.fake_quantize(
                w, layer.weight_scale, getattr(layer, "weight_zero_point", None), scheme
            )
        compressor = library.ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        folder.mkdir()
        state = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        settings = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(settings))
        compressor.update_config(folder)
        return dense, {}

    return make


def gguf(kinds: dict[str, str]) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        folder.mkdir()
        write_gguf(importlib.import_module("gguf"), folder / "model.gguf", llama(), kinds)
        dense = load(folder, gguf_file="model.gguf", dtype=torch.float32)
        return dense, {"gguf_file": "model.gguf", "dtype": torch.float32}

    return make


def gptqmodel(**settings: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        library = importlib.import_module("gptqmodel")
        library._default_cpu_workers = lambda: 2  # fewer, as on a small machine, are refused
        plain = folder.parent / "plain"
        llama().half().save_pretrained(plain)
        hf_models.add_words(plain)
        PreTrainedTokenizerFast(tokenizer_file=str(plain / "tokenizer.json"), unk_token="w0").save_pretrained(plain)
        config = library.QuantizeConfig(**settings)
        model = library.GPTQModel.load(str(plain), config, device="cpu", dtype=torch.float16)
        ids = torch.randint(1, 96, (16, 1, 64), generator=torch.Generator().manual_seed(0))
        model.quantize([{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in ids], batch_size=1)
        model.save(str(folder))
        theirs = library.GPTQModel.load(
            str(folder), backend=library.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        )
        dense = llama().half()
        for name, layer in linear_layers(dense):
            layer.weight.data = theirs.model.get_submodule(name).dequantize_weight().t().contiguous()
        return dense, {}

    return make


FOLDERS: dict[str, tuple[str, Callable[[Path], Made]]] = {
    "gptqmodel-4": ("gptqmodel", gptqmodel(bits=4, group_size=32)),
    "gptqmodel-4-desc_act": (
        "gptqmodel",
        gptqmodel(bits=4, group_size=32, desc_act=True, act_group_aware=False),
    ),
    "hqq-8": ("hqq", hqq(8)),
    "hqq-4": ("hqq", hqq(4)),
    "hqq-3": ("hqq", hqq(3)),
    "quanto-int8": ("optimum.quanto", quanto("qint8")),
    "quanto-int4": ("optimum.quanto", quanto("qint4")),
    "bitsandbytes-nf4": ("bitsandbytes", bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "bitsandbytes-nf4-double": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes-int8": ("bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "compressed-tensors-W4A16": ("compressed_tensors", compressed_tensors("W4A16")),
    "compressed-tensors-W8A16": ("compressed_tensors", compressed_tensors("W8A16")),
    "gguf-Q4_0": ("gguf", gguf({})),
    "gguf-Q8_0": ("gguf", gguf({"": "Q8_0"})),
    "gguf-mixed": ("gguf", gguf({"ffn_down": "Q5_1", "attn": "Q8_0"})),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name, tmp_path):
    package, make = FOLDERS[name]
    pytest.importorskip(package)
    folder = tmp_path / "theirs"
    dense, how = make(folder)
    model = load(folder, quantization_config=AoConfig("as_stored"), **how)
    if how:
        convert_gguf(folder / "model.gguf", tmp_path / "ours", dtype=torch.float32)
    else:
        convert_folder(folder, tmp_path / "ours")
    again = load(tmp_path / "ours")
    for key, p in dense.named_parameters():
        for mine in (model.get_parameter(key), again.get_parameter(key)):
            assert isinstance(mine, QTensor) == (
                p.dim() == 2 and (bool(how) or not key.endswith("embed_tokens.weight"))
            )
            got = mine.dequantize() if isinstance(mine, QTensor) else mine
            assert torch.allclose(got, p, rtol=1e-6, atol=0) if "int8" in name else torch.equal(got, p), key
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    assert model.get_memory_footprint(return_buffers=False) <= 1.03 * size
    with torch.no_grad():
        words = [m.generate(hf_models.IDS, max_new_tokens=16, do_sample=False) for m in (model, again, dense)]
    assert torch.equal(words[0], words[2]) and torch.equal(words[1], words[2])
