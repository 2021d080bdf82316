"""The examples of torchao's pages, written anew: each runs with the import path changed, and gives a number that is known.

A class is a page, a function one of its examples. The models are small, and what an example compiles is traced only, so that the
whole file takes seconds: tests of what is generated are elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Toy(nn.Module):
    """Two linear layers, as the pages have them."""

    def __init__(self, m: int = 64, n: int = 128, k: int = 64, bias: bool = False):
        super().__init__()
        self.linear1 = nn.Linear(m, n, bias=bias)
        self.linear2 = nn.Linear(n, k, bias=bias)

    def example_inputs(self, batch_size: int = 4, dtype: torch.dtype = torch.float32):
        return (torch.randn(batch_size, self.linear1.in_features, dtype=dtype),)

    def forward(self, x):
        return self.linear2(self.linear1(x))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def toy(dtype: torch.dtype = torch.bfloat16, k: int = 64) -> Toy:
    torch.manual_seed(1)
    return Toy(k, 128, k).eval().to(dtype)


def trace(model: nn.Module) -> nn.Module:
    """`torch.compile` without the time that generating code takes."""
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def noise(model: nn.Module, dtype: torch.dtype = torch.bfloat16, k: int = 64) -> float:
    """SQNR of a quantized toy, in dB."""
    from ao.compat.torchao.quantization.utils import compute_error

    x = torch.randn(32, k, dtype=dtype)
    with torch.no_grad():
        return float(compute_error(toy(dtype, k)(x), model(x)))


def fit(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None, k: int = 64) -> list[float]:
    """Losses of a few steps toward ones."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, k, dtype=next(iter(model.parameters())).dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), torch.ones(()).to(x).expand(32, model(x).shape[-1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestReadme:
    def test_int4_weights(self):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = toy()
        quantize_(model, Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d", version=2))
        assert 19 < noise(model) < 24

    def test_int4_weights_by_the_old_name(self):
        from ao.compat.torchao.quantization import int4_weight_only, quantize_

        model = toy()
        quantize_(model, int4_weight_only(group_size=32, use_hqq=True))
        assert 19 < noise(model) < 25

    def test_float8_weights_and_activations(self):
        from ao.compat.torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        model = toy()
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        assert 24 < noise(trace(model)) < 32

    def test_autoquant(self):
        import ao.compat.torchao as torchao

        model = torchao.autoquant(toy(torch.float32))
        model(*model.example_inputs())
        assert len(model.autoquant_report.choices) == 2

    def test_quantization_aware_training(self):
        from ao.compat.torchao.quantization import Int8DynamicActivationInt4WeightConfig, quantize_
        from ao.compat.torchao.quantization.qat import QATConfig

        model, base = toy(torch.float32).train(), Int8DynamicActivationInt4WeightConfig(group_size=32)
        quantize_(model, QATConfig(base, step="prepare"))
        losses = fit(model)
        quantize_(model, QATConfig(base, step="convert"))
        assert losses[-1] < losses[0] and model.linear1.weight.spec.bits == 4

    def test_low_bit_optimizer(self):
        from ao.compat.torchao.optim import AdamW8bit

        model = toy(torch.float32)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, compile=False)
        losses = fit(model, optimizer=optimizer)
        assert losses[-1] < losses[0]

    def test_float8_training(self):
        from ao.compat.torchao.float8 import convert_to_float8_training
        from ao.compat.torchao.float8.float8_linear import Float8Linear

        model = toy(torch.float32)
        convert_to_float8_training(model)
        assert sum(isinstance(m, Float8Linear) for m in model.modules()) == 2
        losses = fit(model)
        assert losses[-1] < losses[0]

    def test_the_kv_cache_and_the_size_of_a_model(self):
        from ao.compat.torchao.quantization import int8_weight_only, quantize_
        from ao.compat.torchao.utils import get_model_size_in_bytes

        model = toy()
        before = get_model_size_in_bytes(model)
        quantize_(model, int8_weight_only())
        assert 0.5 < get_model_size_in_bytes(model) / before < 0.55


class TestQuickStart:
    def test_quantize(self):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = trace(toy())
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
        assert isinstance(model.linear1, nn.Linear) and 19 < noise(model) < 24

    def test_the_size_of_a_file(self, tmp_path):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = Toy(256, 512, 256).bfloat16()
        torch.save(model, tmp_path / "bfloat16_model.pt")
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
        torch.save(model, tmp_path / "int4_model.pt")
        sizes = [os.path.getsize(tmp_path / f"{name}_model.pt") for name in ("int4", "bfloat16")]
        assert 0.25 < sizes[0] / sizes[1] < 0.35

    def test_benchmark(self):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_
        from ao.compat.torchao.utils import benchmark_model, unwrap_tensor_subclass

        model = toy()
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
        unwrap_tensor_subclass(model)
        assert 0 < benchmark_model(model, 2, model.example_inputs(dtype=torch.bfloat16)) < math.inf

    def test_int8_weights_and_activations(self):
        from ao.compat.torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, quantize_

        model = toy()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        assert isinstance(model.linear1.weight, Int8Tensor) and 36 < noise(model) < 44

    def test_the_size_of_a_state_dict(self, tmp_path):
        from ao.compat.torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = Toy(256, 512, 256).bfloat16()
        torch.save(model.state_dict(), tmp_path / "w16a16.pth")
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch.save(model.state_dict(), tmp_path / "w8a8.pth")
        assert 1.8 < os.path.getsize(tmp_path / "w16a16.pth") / os.path.getsize(tmp_path / "w8a8.pth") < 2.05


class TestSerialization:
    def test_save_and_load(self, tmp_path):
        from ao.compat.torchao.quantization.quant_api import int4_weight_only, quantize_
        from ao.compat.torchao.utils import get_model_size_in_bytes

        model = toy(k=128)
        inputs, before = model.example_inputs(dtype=torch.bfloat16), get_model_size_in_bytes(model)
        quantize_(model, int4_weight_only())
        assert get_model_size_in_bytes(model) < before / 3
        expected = model(*inputs)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        with torch.device("meta"):
            loaded = Toy(128, 128, 128).eval().bfloat16()
        loaded.load_state_dict(torch.load(tmp_path / "model.pt"), assign=True)
        assert torch.equal(loaded(*inputs), expected)

    def test_safetensors(self, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        from ao.compat.torchao.prototype.safetensors.safetensors_support import (
            flatten_tensor_state_dict,
            unflatten_tensor_state_dict,
        )
        from ao.compat.torchao.quantization import Float8WeightOnlyConfig, quantize_

        model = toy()
        quantize_(model, Float8WeightOnlyConfig())
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
            state, left = unflatten_tensor_state_dict(load_file(tmp_path / "model.safetensors"), opened.metadata())
        loaded = toy()
        loaded.load_state_dict(state, assign=True)
        assert not left and noise(loaded) == noise(model)


class TestQuantization:
    def test_autoquant_with_int4(self):
        import ao.compat.torchao as torchao
        from ao.compat.torchao.quantization import DEFAULT_INT4_AUTOQUANT_CLASS_LIST

        model = torchao.autoquant(
            nn.Sequential(nn.Linear(32, 64)), qtensor_class_list=DEFAULT_INT4_AUTOQUANT_CLASS_LIST
        )
        model(torch.randn(32, 32))
        assert len(model.autoquant_report.choices) == 1

    def test_the_cache_of_autoquant(self, tmp_path):
        from ao.compat.torchao.quantization.autoquant import AUTOQUANT_CACHE

        (tmp_path / "cache.pkl").write_bytes(pickle.dumps(AUTOQUANT_CACHE))
        AUTOQUANT_CACHE.update(pickle.loads((tmp_path / "cache.pkl").read_bytes()))
        assert isinstance(AUTOQUANT_CACHE, dict)

    def test_a_flow(self):
        from ao.compat.torchao.quantization.quant_api import int4_weight_only, quantize_
        from ao.compat.torchao.utils import TORCH_VERSION_AT_LEAST_2_5, benchmark_model, unwrap_tensor_subclass

        model = toy()
        quantize_(model, int4_weight_only(group_size=32))
        if not TORCH_VERSION_AT_LEAST_2_5:
            unwrap_tensor_subclass(model)
        model = trace(model)
        assert benchmark_model(model, 2, (torch.randn(1, 64, dtype=torch.bfloat16),)) > 0 and noise(model) > 19

    def test_weights_by_hand(self):
        from ao.compat.torchao.dtypes import to_affine_quantized_intx
        from ao.compat.torchao.quantization import to_linear_activation_quantized
        from ao.compat.torchao.quantization.quant_primitives import MappingType

        def int8(t):
            return to_affine_quantized_intx(
                t, MappingType.SYMMETRIC, (1, t.shape[1]), torch.int8, eps=1e-7, zero_point_dtype=torch.int64
            )

        model = toy(torch.float32)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(int8(module.weight), requires_grad=False)
                module.weight = nn.Parameter(to_linear_activation_quantized(module.weight, int8), requires_grad=False)
        assert 36 < noise(model, torch.float32) < 46

    def test_export(self):
        from ao.compat.torchao.quantization import int8_weight_only, quantize_
        from ao.compat.torchao.utils import unwrap_tensor_subclass

        model = toy(torch.float32)
        quantize_(model, int8_weight_only())
        inputs = model.example_inputs()
        exported = torch.export.export(unwrap_tensor_subclass(model), inputs).module()
        torch.testing.assert_close(exported(*inputs), model(*inputs))

    def test_int8_weights_and_activations(self):
        from ao.compat.torchao.quantization import int8_dynamic_activation_int8_weight, quantize_

        model = toy()
        quantize_(model, int8_dynamic_activation_int8_weight())
        assert 36 < noise(model) < 44

    def test_int8_weights(self):
        from ao.compat.torchao.quantization import int8_weight_only, quantize_

        model = toy()
        quantize_(model, int8_weight_only(), set_inductor_config=False)
        assert 38 < noise(model) < 46

    @pytest.mark.parametrize(
        ("name", "bits"),
        [
            ("change_linear_weights_to_int8_dqtensors", 8),
            ("change_linear_weights_to_int8_woqtensors", 8),
            ("change_linear_weights_to_int4_woqtensors", 4),
        ],
    )
    def test_functions_before_quantize_(self, name, bits):
        from ao.compat.torchao.quantization import quant_api

        model = toy(torch.bfloat16, 128)
        getattr(quant_api, name)(model)
        assert model.linear1.weight.spec.bits == bits and noise(model, k=128) > 17

    def test_any_bits(self):
        from ao.compat.torchao.quantization import quantize_, uintx_weight_only

        model = toy()
        quantize_(model, uintx_weight_only(torch.uint4, group_size=64))
        assert 18 < noise(model) < 24

    def test_fp6(self):
        from ao.compat.torchao.quantization import fpx_weight_only, quantize_

        model = toy(torch.float16)
        quantize_(model, fpx_weight_only(3, 2))
        assert 22 < noise(model, torch.float16) < 32

    def test_gptq(self):
        from ao.compat.torchao.quantization.GPTQ import Int4WeightOnlyGPTQQuantizer, MultiTensorInputRecorder

        model = toy(torch.float32)
        recorder = MultiTensorInputRecorder()
        for _ in range(4):
            recorder(*model.example_inputs(16))
        Int4WeightOnlyGPTQQuantizer(groupsize=32).quantize(model, recorder.get_recorded_inputs())
        assert 19 < noise(model, torch.float32) < 27

    def test_int8_activations_and_int4_weights(self):
        from ao.compat.torchao.quantization.quant_api import Int8DynActInt4WeightQuantizer

        model = Int8DynActInt4WeightQuantizer(groupsize=32).quantize(toy(torch.float32))
        assert 17 < noise(model, torch.float32) < 24

    def test_smoothquant_by_swapping(self):
        from ao.compat.torchao.quantization.smoothquant import (
            smooth_fq_linear_to_inference,
            swap_linear_with_smooth_fq_linear,
        )

        model = toy(torch.float32)
        swap_linear_with_smooth_fq_linear(model)
        model.train()
        for _ in range(3):
            model(*model.example_inputs(32))
        smooth_fq_linear_to_inference(model)
        assert 33 < noise(trace(model), torch.float32) < 46

    def test_parts_of_a_model(self):
        from ao.compat.torchao.quantization import int4_weight_only, int8_weight_only, quantize_

        model = toy()
        quantize_(model, int8_weight_only(), lambda module, name: name == "linear1")
        quantize_(model, int4_weight_only(group_size=32), lambda module, name: name == "linear2")
        assert [model.linear1.weight.spec.bits, model.linear2.weight.spec.bits] == [8, 4]

    @pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
    def test_gemlite(self, mode):
        from ao.compat.torchao.quantization import gemlite_uintx_weight_only, quantize_

        model = toy(torch.float16)
        quantize_(model, gemlite_uintx_weight_only(group_size=64, bit_width=8, mode=mode))
        assert 30 < noise(model, torch.float16) < 55


class TestInference:
    """One example for each config of the page of inference."""

    def check(self, config, low, high, dtype=torch.bfloat16, k=64, *, traced=False):
        from ao.compat.torchao.quantization import quantize_

        model = toy(dtype, k)
        quantize_(model, config)
        assert low < noise(trace(model) if traced else model, dtype, k) < high

    def test_float8_dynamic_activation_float8_weight(self):
        from ao.compat.torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor

        self.check(Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()), 24, 32)

    def test_float8_weight_only(self):
        from ao.compat.torchao.quantization import Float8WeightOnlyConfig

        self.check(Float8WeightOnlyConfig(), 26, 36)

    def test_int8_dynamic_activation_int8_weight(self):
        from ao.compat.torchao.quantization import Int8DynamicActivationInt8WeightConfig

        self.check(Int8DynamicActivationInt8WeightConfig(), 36, 44, traced=True)

    def test_int8_weight_only(self):
        from ao.compat.torchao.quantization import Int8WeightOnlyConfig

        self.check(Int8WeightOnlyConfig(), 38, 46)

    def test_mxfp8(self):
        from ao.compat.torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
        from ao.compat.torchao.quantization.quantize_.common import KernelPreference

        config = MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float8_e4m3fn,
            weight_dtype=torch.float8_e4m3fn,
            kernel_preference=KernelPreference.AUTO,
        )
        self.check(config, 24, 32, traced=True)

    def test_mxfp4(self):
        from ao.compat.torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig

        kind = torch.float4_e2m1fn_x2
        self.check(MXDynamicActivationMXWeightConfig(activation_dtype=kind, weight_dtype=kind), 10, 18)

    def test_int4_weight_only(self):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig

        self.check(Int4WeightOnlyConfig(group_size=32, int4_packing_format="plain"), 19, 24)

    def test_float8_dynamic_activation_int4_weight(self):
        from ao.compat.torchao.quantization import Float8DynamicActivationInt4WeightConfig

        self.check(Float8DynamicActivationInt4WeightConfig(), 14, 24, k=128)

    def test_nvfp4_weight_only(self):
        from ao.compat.torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

        self.check(NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=True), 14, 21)

    def test_nvfp4(self):
        from ao.compat.torchao.prototype.mx_formats.inference_workflow import NVFP4DynamicActivationNVFP4WeightConfig

        self.check(
            NVFP4DynamicActivationNVFP4WeightConfig(use_dynamic_per_tensor_scale=True, use_triton_kernel=True), 13, 22
        )

    def test_intx_weight_only(self):
        from ao.compat.torchao.quantization import IntxWeightOnlyConfig

        self.check(IntxWeightOnlyConfig(), 38, 46)

    def test_int8_dynamic_activation_intx_weight(self):
        from ao.compat.torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
        self.check(config, 17, 24)

    def test_int8_dynamic_activation_int4_weight(self):
        from ao.compat.torchao.quantization import Int8DynamicActivationInt4WeightConfig

        self.check(Int8DynamicActivationInt4WeightConfig(), 17, 24)

    @pytest.mark.parametrize(("bits", "group", "low"), [(4, 128, 16), (8, None, 36)])
    def test_uintx_weight_only(self, bits, group, low):
        from ao.compat.torchao.prototype.quantization import UIntxWeightOnlyConfig

        config = UIntxWeightOnlyConfig(group_size=group, bit_width=bits, packing_bitwidth=32)
        self.check(config, low, low + 12, torch.float16, 128)

    @pytest.mark.parametrize(("bits", "group", "low"), [(4, 128, 16), (8, None, 36)])
    def test_int8_dynamic_activation_uintx_weight(self, bits, group, low):
        from ao.compat.torchao.prototype.quantization import Int8DynamicActivationUIntxWeightConfig

        config = Int8DynamicActivationUIntxWeightConfig(group_size=group, bit_width=bits, packing_bitwidth=32)
        self.check(config, low, low + 12, torch.float16, 128)


class TestQAT:
    """Quantization-aware training."""

    def test_from_a_config(self):
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_
        from ao.compat.torchao.quantization.qat import QATConfig

        model, base = toy(torch.float32).train(), Int4WeightOnlyConfig(group_size=32)
        quantize_(model, QATConfig(base, step="prepare"))
        fit(model)
        inputs = model.example_inputs()
        trained = model(*inputs)
        quantize_(model, QATConfig(base, step="convert"))
        torch.testing.assert_close(model(*inputs), trained)

    def test_from_configs_of_rounding(self):
        from ao.compat.torchao.quantization import quantize_
        from ao.compat.torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        model = toy(torch.float32).train()
        activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
        losses = fit(model)
        assert losses[-1] < losses[0]

    def test_ranges_of_activations_that_are_calibrated(self):
        from ao.compat.torchao.quantization import quantize_
        from ao.compat.torchao.quantization.granularity import PerGroup, PerTensor
        from ao.compat.torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig
        from ao.compat.torchao.quantization.quant_primitives import MappingType

        kind = MappingType.SYMMETRIC_NO_CLIPPING_ERR
        activation = IntxFakeQuantizeConfig(torch.int16, PerTensor(), kind, is_dynamic=False)
        weight = IntxFakeQuantizeConfig(torch.int4, PerGroup(32), kind)
        model = toy(torch.float32)
        quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
        layers = [m for m in model.modules() if isinstance(m, FakeQuantizedLinear)]
        for layer in layers:
            layer.activation_fake_quantizer.enable_calibration()
        batches = [torch.randn(16, 64) for _ in range(3)]
        with torch.no_grad():
            for batch in batches:
                model(batch)
        for layer in layers:
            quantizer = layer.activation_fake_quantizer
            quantizer.set_running_min_max(*quantizer.get_running_min_max())
            quantizer.finalize_calibration()
        first, seen = layers[0].activation_fake_quantizer, torch.stack(batches)
        torch.testing.assert_close(first.scale.reshape(()), torch.maximum(seen.max() / 32767, seen.min() / -32768))
        assert fit(model)[-1] < 5

    def test_embeddings(self):
        from ao.compat.torchao.quantization import quantize_
        from ao.compat.torchao.quantization.qat import FakeQuantizedEmbedding, IntxFakeQuantizeConfig, QATConfig

        model = nn.Sequential(nn.Embedding(16, 64), toy(torch.float32))
        config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare")
        quantize_(model, config, filter_fn=lambda m, _: isinstance(m, nn.Embedding))
        assert isinstance(model[0], FakeQuantizedEmbedding) and model(torch.arange(4)).shape == (4, 64)

    def test_by_a_quantizer(self):
        from ao.compat.torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer

        quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
        model = quantizer.prepare(toy(torch.float32).train())
        fit(model)
        model = quantizer.convert(model)
        assert model.linear1.weight.spec.bits == 4

    def test_by_several_quantizers(self):
        from ao.compat.torchao.quantization.qat import (
            ComposableQATQuantizer,
            Int4WeightOnlyEmbeddingQATQuantizer,
            Int8DynActInt4WeightQATQuantizer,
        )

        quantizer = ComposableQATQuantizer(
            [Int8DynActInt4WeightQATQuantizer(groupsize=32), Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)]
        )
        model = quantizer.prepare(nn.Sequential(nn.Embedding(16, 64), toy(torch.float32)))
        trained = model(torch.arange(4))
        torch.testing.assert_close(quantizer.convert(model)(torch.arange(4)), trained)

    def test_by_the_old_config(self):
        from ao.compat.torchao.quantization import int8_dynamic_activation_int4_weight, quantize_
        from ao.compat.torchao.quantization.qat import (
            FakeQuantizeConfig,
            FromIntXQuantizationAwareTrainingConfig,
            IntXQuantizationAwareTrainingConfig,
        )

        model = toy(torch.float32).train()
        activation = FakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weight = FakeQuantizeConfig(torch.int4, group_size=32)
        quantize_(model, IntXQuantizationAwareTrainingConfig(activation, weight))
        fit(model)
        quantize_(model, FromIntXQuantizationAwareTrainingConfig())
        quantize_(model, int8_dynamic_activation_int4_weight(group_size=32))
        assert model.linear1.weight.spec.bits == 4


class TestTraining:
    def test_float8_and_a_checkpoint(self, tmp_path):
        from ao.compat.torchao.float8 import convert_to_float8_training
        from ao.compat.torchao.float8.float8_linear import Float8Linear
        from ao.compat.torchao.quantization import Float8DynamicActivationFloat8WeightConfig
        from ao.compat.torchao.quantization.granularity import PerTensor
        from ao.compat.torchao.quantization.quant_api import quantize_

        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32), nn.Linear(32, 1)).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def fits(module, name):
            sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (0, 0)
            return name != "1" and all(size % 16 == 0 for size in sizes)

        convert_to_float8_training(model, module_filter_fn=fits)
        assert [isinstance(m, Float8Linear) for m in model] == [True, False, False]
        fit(model, 3, optimizer)
        saved = {"model": model, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
        torch.save(saved, tmp_path / "checkpoint.pth")

        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
        loaded = checkpoint["model"]
        loaded.load_state_dict(checkpoint["model_state_dict"])
        quantize_(loaded, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()))
        with torch.inference_mode():
            assert loaded(torch.randn(1, 16, 64, dtype=torch.bfloat16)).shape == (1, 16, 1)

    @pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
    def test_float8_recipes(self, recipe):
        from ao.compat.torchao.float8 import Float8LinearConfig, convert_to_float8_training

        model = toy(torch.float32).train()
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
        losses = fit(model)
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("mode", ["FLOOR", "RCEIL", "CEIL", "EVEN"])
    def test_mx(self, mode):
        from ao.compat.torchao.prototype.mx_formats import MXLinearConfig, ScaleCalculationMode
        from ao.compat.torchao.quantization import quantize_
        from ao.compat.torchao.quantization.quantize_.common import KernelPreference

        model = toy(torch.float32).train()
        config = MXLinearConfig(
            elem_dtype=torch.float8_e4m3fn,
            block_size=32,
            kernel_preference=KernelPreference.AUTO,
            scale_calculation_mode=ScaleCalculationMode[mode],
        )
        quantize_(model, config)
        assert 21 < noise(model, torch.float32) < 29
        losses = fit(model)
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize(
        ("dtype", "low"),
        [(torch.float8_e4m3fn, 28), (torch.float8_e5m2, 22), ("fp6_e2m3", 27), ("fp6_e3m2", 22), ("fp4", 16)],
    )
    def test_mx_tensors(self, dtype, low):
        from ao.compat.torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
        from ao.compat.torchao.prototype.mx_formats.mx_tensor import MXTensor
        from ao.compat.torchao.quantization import compute_error

        assert (DTYPE_FP6_E2M3, DTYPE_FP6_E3M2) == ("fp6_e2m3", "fp6_e3m2")
        x = torch.randn(32, 64)
        q = MXTensor.to_mx(x, torch.float4_e2m1fn_x2 if dtype == "fp4" else dtype)
        assert isinstance(q, MXTensor) and low < compute_error(x, q.to_dtype(torch.float)) < low + 6

    def test_nvfp4_tensors(self):
        from ao.compat.torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
        from ao.compat.torchao.quantization import compute_error

        x = torch.randn(32, 64)
        scale = per_tensor_amax_to_scale(x.abs().max())
        q = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)
        torch.testing.assert_close(q.per_tensor_scale, scale)
        assert 19 < compute_error(x, q.dequantize(torch.float32)) < 23

    def test_int8_weights(self):
        from ao.compat.torchao.prototype.low_bit_optim import _AdamW
        from ao.compat.torchao.prototype.quantized_training import int8_weight_only_quantized_training
        from ao.compat.torchao.quantization.quant_api import quantize_

        model = toy(torch.float32).train()
        quantize_(model, int8_weight_only_quantized_training())
        losses = fit(model, 4, _AdamW(model.parameters(), lr=1e-2, compile=False))
        assert losses[-1] < losses[0]

    def test_int8_mixed_precision(self):
        from ao.compat.torchao.prototype.quantized_training import (
            Int8MixedPrecisionTrainingConfig,
            int8_mixed_precision_training,
        )
        from ao.compat.torchao.quantization import quantize_

        model = toy(torch.float32).train()
        config = Int8MixedPrecisionTrainingConfig(output=True, grad_input=True, grad_weight=False)
        quantize_(model, int8_mixed_precision_training(config))
        losses = fit(model)
        assert losses[-1] < losses[0]

    def test_bitnet(self):
        from ao.compat.torchao.prototype.quantized_training import bitnet_training
        from ao.compat.torchao.quantization import quantize_

        model = toy(torch.float32).train()
        quantize_(model, bitnet_training(), filter_fn=lambda m, name: name == "linear1")
        losses = fit(model, 6)
        assert losses[-1] < losses[0]


class TestOptim:
    @pytest.mark.parametrize("name", ["Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"])
    def test_drop_in(self, name):
        from ao.compat.torchao import optim

        model = toy(torch.float32)
        losses = fit(model, 3, getattr(optim, name)(model.parameters(), lr=1e-2, block_size=128, compile=False))
        assert losses[-1] < losses[0]

    def test_stochastic_rounding(self):
        from ao.compat.torchao.optim import _AdamW

        model = toy(torch.bfloat16)
        before = model.linear1.weight.detach().clone()
        fit(model, 1, _AdamW(model.parameters(), lr=1e-5, bf16_stochastic_round=True, compile=False))
        assert 0 < (model.linear1.weight != before).float().mean() < 0.9

    @pytest.mark.parametrize("offload_gradients", [False, True])
    def test_offload(self, offload_gradients, tmp_path):
        from ao.compat.torchao.optim import CPUOffloadOptimizer

        def make(model):
            return CPUOffloadOptimizer(
                model.parameters(), torch.optim.AdamW, offload_gradients=offload_gradients, fused=True
            )

        model = toy(torch.float32)
        optimizer = make(model)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(1e-2)
            else:
                group["lr"] = 1e-2
        losses = fit(model, 2, optimizer)
        torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "checkpoint.pth")
        checkpoint = torch.load(tmp_path / "checkpoint.pth")
        again = toy(torch.float32)
        again.load_state_dict(checkpoint["model"])
        optimizer = make(again)
        optimizer.load_state_dict(checkpoint["optim"])
        assert fit(again, 2, optimizer)[-1] < losses[0]


class TestStaticQuantization:
    def test_observers_and_fixed_scales(self):
        """Linear layers that observe, in place of plain ones; then quantized ones in place of those, by a config of one's own."""
        from ao.compat.torchao.core.config import AOBaseConfig
        from ao.compat.torchao.quantization import Int8Tensor, PerRow, quantize_
        from ao.compat.torchao.quantization.granularity import PerAxis, PerTensor
        from ao.compat.torchao.quantization.observer import AffineQuantizedMinMaxObserver
        from ao.compat.torchao.quantization.quant_api import _replace_with_custom_fn_if_matches_filter
        from ao.compat.torchao.quantization.quant_primitives import MappingType
        from ao.compat.torchao.quantization.transform_module import register_quantize_module_handler

        def observer(granularity):
            return AffineQuantizedMinMaxObserver(
                MappingType.ASYMMETRIC, torch.int8, granularity=granularity, eps=1e-7, scale_dtype=torch.float32,
                zero_point_dtype=torch.int32,
            )  # fmt: skip

        class Observed(nn.Linear):
            @classmethod
            def from_float(cls, linear):
                made = cls(linear.in_features, linear.out_features, False, dtype=linear.weight.dtype)
                made.weight, made.act_obs, made.weight_obs = linear.weight, observer(PerTensor()), observer(PerAxis(0))
                return made

            def forward(self, x):
                return F.linear(self.act_obs(x), self.weight_obs(self.weight))

        class Quantized(nn.Module):
            def __init__(self, observed):
                super().__init__()
                self.act_scale, self.act_zero_point = observed.act_obs.calculate_qparams()
                scale, zero_point = observed.weight_obs.calculate_qparams()
                self.qweight = Int8Tensor.from_hp(
                    observed.weight.detach(), PerRow(), scale=scale, zero_point=zero_point
                )

            def forward(self, x):
                q = Int8Tensor.from_hp(x, PerTensor(), scale=self.act_scale, zero_point=self.act_zero_point)
                return F.linear(q, self.qweight)

        @dataclass
        class StaticConfig(AOBaseConfig):
            pass

        @register_quantize_module_handler(StaticConfig)
        def _apply(module, config):
            return Quantized(module)

        model = toy(torch.float32)
        _replace_with_custom_fn_if_matches_filter(model, Observed.from_float, lambda m, _: isinstance(m, nn.Linear))
        for _ in range(10):
            model(*model.example_inputs(32))
        quantize_(model, StaticConfig(), lambda m, _: isinstance(m, Observed))
        assert isinstance(model.linear1, Quantized) and 32 < noise(model, torch.float32) < 46

    def test_by_a_config(self):
        from ao.compat.torchao.prototype.smoothquant import SmoothQuantConfig
        from ao.compat.torchao.quantization import Int8StaticActivationInt8WeightConfig, quantize_

        model = toy(torch.float32)
        quantize_(model, SmoothQuantConfig(Int8StaticActivationInt8WeightConfig(), step="prepare"))
        for _ in range(5):
            model(*model.example_inputs(32))
        quantize_(model, SmoothQuantConfig(Int8StaticActivationInt8WeightConfig(), step="convert"))
        assert 30 < noise(model, torch.float32) < 46


class TestFinetuning:
    def test_a_frozen_nf4_layer(self):
        from ao.compat.torchao.dtypes import NF4Tensor, to_nf4
        from ao.compat.torchao.dtypes.nf4tensor import linear_nf4

        class FrozenNF4Linear(nn.Linear):
            def __init__(self, *args, **quantization):
                super().__init__(*args, bias=False)
                self.weight.requires_grad_(False)
                self.weight = nn.Parameter(to_nf4(self.weight, **quantization), requires_grad=False)

            def forward(self, x):
                return linear_nf4(x, self.weight)

        layer = FrozenNF4Linear(64, 32, block_size=32, scaler_block_size=2)
        x = torch.randn(4, 64, requires_grad=True)
        layer(x).sum().backward()
        assert isinstance(layer.weight.data, NF4Tensor)
        torch.testing.assert_close(x.grad[0], layer.weight.get_original_weight().sum(0))

    @pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )  # peft, of transformers
    def test_adapters_over_int8(self, tmp_path):
        peft = pytest.importorskip("peft", reason="needs peft: pip install 'ao-lowbit[peft]'")
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.torchao.quantization import Int8WeightOnlyConfig
        from ao.integrations.transformers import AoConfig as TorchAoConfig

        hf_models.llama(num_hidden_layers=1).save_pretrained(tmp_path)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 4 and model.base_model.model.model.layers[0].mlp.up_proj.weight.spec.bits == 8


class TestServing:
    def test_embeddings_and_linear_layers(self, tmp_path):
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.torchao.quantization.granularity import PerAxis, PerGroup
        from ao.compat.torchao.quantization.quant_api import (
            FqnToConfig,
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
        )
        from ao.integrations.transformers import AoConfig as TorchAoConfig

        hf_models.llama(num_hidden_layers=1, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
        embedding = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        linear = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32), weight_scale_dtype=torch.bfloat16
        )
        config = TorchAoConfig(
            quant_type=FqnToConfig({"_default": linear, "model.embed_tokens": embedding}),
            include_embedding=True,
            modules_to_not_convert=[],
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied", quantization_config=config)
        assert [model.model.embed_tokens.weight.spec.bits, model.lm_head.weight.spec.bits] == [8, 4]
        model.save_pretrained(tmp_path / "8da4w")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "8da4w")
        assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))

    def test_a_config_of_transformers(self, tmp_path):
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.torchao.quantization import Float8DynamicActivationInt4WeightConfig
        from ao.integrations.transformers import AoConfig as TorchAoConfig

        hf_models.llama(num_hidden_layers=1).save_pretrained(tmp_path)
        config = TorchAoConfig(quant_type=Float8DynamicActivationInt4WeightConfig(group_size=32))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", quantization_config=config)
        assert model.model.layers[0].mlp.up_proj.weight.spec.bits == 4

    def test_configs_are_one_class(self):
        from ao.compat.torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig

        config = Int4WeightOnlyConfig(group_size=128)
        assert isinstance(config, AOBaseConfig)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config

    def test_rules_by_name(self):
        from ao.compat.torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        model = nn.ModuleDict(
            {"q_proj": nn.Linear(64, 64), "gate_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 64)}
        )
        rules = {
            "q_proj": Int4WeightOnlyConfig(group_size=64),
            "gate_proj": Int8WeightOnlyConfig(),
            "_default": Int4WeightOnlyConfig(group_size=32),
        }
        quantize_(model, FqnToConfig(rules), filter_fn=None)
        assert [model[n].weight.spec.block for n in model] == [(1, 64), (1, -1), (1, 32)]

    def test_an_own_tensor_that_is_sharded(self):
        from ao.compat.torchao.core.config import AOBaseConfig
        from ao.compat.torchao.quantization import quantize_
        from ao.compat.torchao.quantization.transform_module import register_quantize_module_handler
        from ao.compat.torchao.utils import TorchAOBaseTensor, fill_defaults

        aten = torch.ops.aten

        class Own(TorchAOBaseTensor):
            tensor_data_names: ClassVar[list[str]] = ["codes", "factor"]
            tensor_attribute_names: ClassVar[list[str]] = ["dtype"]

            @staticmethod
            def __new__(cls, codes, factor, dtype):
                return torch.Tensor._make_wrapper_subclass(cls, codes.shape, device=codes.device, dtype=dtype)

            def __init__(self, codes, factor, dtype):
                self.codes, self.factor = codes, factor

            def dequantize(self):
                return self.codes.to(self.dtype) * self.factor

        @Own.implements([aten.slice.Tensor])
        def _(func, types, args, kwargs):
            self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
            return Own(func(self.codes, dim, start, end, step), self.factor, self.dtype)

        @Own.implements_torch_function(F.linear)
        def _(func, types, args, kwargs):
            x, w, bias = args[0], args[1], args[2] if len(args) > 2 else None
            return F.linear(x, w.dequantize(), bias)

        @dataclass
        class OwnConfig(AOBaseConfig):
            bits: int = 8

        @register_quantize_module_handler(OwnConfig)
        def _transform(module, config):
            factor = module.weight.detach().abs().max() / 127
            codes = (module.weight.detach() / factor).round().to(torch.int8)
            module.weight = nn.Parameter(Own(codes, factor, module.weight.dtype), requires_grad=False)
            return module

        model = toy(torch.float32)
        quantize_(model, OwnConfig())
        part = model.linear1.weight.narrow(0, 16, 32)
        target = Own(torch.zeros(32, 64, dtype=torch.int8), torch.zeros(()), torch.float32)
        target.copy_(part)
        assert torch.equal(target.dequantize(), model.linear1.weight.dequantize()[16:48])
        assert 36 < noise(model, torch.float32) < 46


class TestContributing:
    def test_float8_weights_by_hand(self):
        from ao.compat.torchao.quantization import Float8Tensor

        model = toy()
        for layer in (model.linear1, model.linear2):
            layer.weight = nn.Parameter(Float8Tensor.from_hp(layer.weight.detach()), requires_grad=False)
        assert 26 < noise(model) < 36

    def test_float8_weights_and_activations_by_hand(self):
        from ao.compat.torchao.quantization import Float8Tensor, PerRow
        from ao.compat.torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

        model = toy()
        act = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
        for layer in (model.linear1, model.linear2):
            q = Float8Tensor.from_hp(
                layer.weight.detach(), float8_dtype=torch.float8_e4m3fn, granularity=PerRow(), act_quant_kwargs=act
            )
            layer.weight = nn.Parameter(q, requires_grad=False)
        assert 24 < noise(model) < 32

    def test_primitives(self):
        from ao.compat.torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )
        from ao.compat.torchao.quantization.utils import compute_error

        w = torch.randn(32, 64)
        scale, zero = choose_qparams_affine(w, MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 15)
        codes = quantize_affine(w, (1, 32), scale, zero, torch.uint8, 0, 15)
        back = dequantize_affine(codes, (1, 32), scale, zero, torch.uint8, 0, 15)
        assert codes.max() <= 15 and 19 < compute_error(w, back) < 24

    def test_integer_products(self):
        from ao.compat.torchao.kernel.intmm import int_matmul, int_scaled_matmul

        a, b = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
        scale = torch.rand(32, 1)
        exact = a.int() @ b.int()
        assert torch.equal(int_matmul(a, b), exact)
        torch.testing.assert_close(int_scaled_matmul(a, b, scale), exact * scale)

    def test_microbenchmarks(self):
        from ao.compat.torchao.utils import benchmark_torch_function_in_microseconds

        assert benchmark_torch_function_in_microseconds(torch.add, torch.ones(2), torch.ones(2)) > 0


class TestPrototypes:
    def test_awq(self):
        from ao.compat.torchao.prototype.awq import AWQConfig
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

        model, base = toy(torch.float32), Int4WeightOnlyConfig(group_size=32)
        quantize_(model, AWQConfig(base, step="prepare"))
        for _ in range(3):
            model(*model.example_inputs(32))
        quantize_(model, AWQConfig(base, step="convert"))
        assert 19 < noise(model, torch.float32) < 26

    def test_awq_with_observers(self):
        from ao.compat.torchao.prototype.awq import AWQObservedLinear, awq_uintx, insert_awq_observer_
        from ao.compat.torchao.quantization import quantize_

        model = toy(torch.float32)
        insert_awq_observer_(model, 3, 32, torch.uint4, scale_search_space_size=10, group_size=32)
        for _ in range(3):
            model(*model.example_inputs(32))
        quantize_(
            model, awq_uintx(quant_dtype=torch.uint4, group_size=32), lambda m, _: isinstance(m, AWQObservedLinear)
        )
        assert 18 < noise(model, torch.float32) < 26

    def test_smoothquant_and_its_recipe(self, tmp_path):
        from ao.compat.torchao.prototype.smoothquant import (
            SmoothQuantConfig,
            SmoothQuantObservedLinear,
            insert_smooth_quant_observer_,
            load_smooth_quant_recipe,
            save_smooth_quant_recipe,
        )
        from ao.compat.torchao.quantization import quantize_

        model = toy(torch.float32)
        insert_smooth_quant_observer_(model, alpha=0.5, quant_mode="dynamic")
        for _ in range(3):
            model(*model.example_inputs(32))
        save_smooth_quant_recipe(model, tmp_path / "recipe.json")
        quantize_(model, SmoothQuantConfig(), lambda m, _: isinstance(m, SmoothQuantObservedLinear))
        assert 33 < noise(model, torch.float32) < 46
        again = toy(torch.float32)
        insert_smooth_quant_observer_(again)
        load_smooth_quant_recipe(again, tmp_path / "recipe.json")
        x = torch.randn(4, 64)
        torch.testing.assert_close(again(x), model(x))

    def test_hqq(self):
        from ao.compat.torchao.quantization import quantize_, uintx_weight_only

        model = toy(torch.float32)
        quantize_(model, uintx_weight_only(torch.uint4, group_size=32, use_hqq=True))
        assert 19 < noise(model, torch.float32) < 26

    def test_gptq(self):
        from ao.compat.torchao.prototype.gptq import GPTQConfig
        from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

        model, base = toy(torch.float32), Int4WeightOnlyConfig(group_size=32)
        quantize_(model, GPTQConfig(step="observe", base_config=base))
        for _ in range(3):
            model(*model.example_inputs(32))
        quantize_(model, GPTQConfig(step="convert", base_config=base))
        assert 19 < noise(model, torch.float32) < 27

    def test_spinquant(self):
        pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.torchao.prototype.spinquant import apply_spinquant

        model = hf_models.llama(num_hidden_layers=1)
        before = hf_models.output("llama", model)
        apply_spinquant(model)
        torch.testing.assert_close(hf_models.output("llama", model), before, atol=1e-3, rtol=1e-3)

    def test_nf4_weights(self):
        from ao.compat.torchao.dtypes._nf4tensor_api import nf4_weight_only
        from ao.compat.torchao.quantization import quantize_

        model = toy()
        quantize_(model, nf4_weight_only())
        assert 16 < noise(model) < 24


class TestQuantLogger:
    @pytest.fixture(autouse=True)
    def _to_stdout(self, monkeypatch):
        from ao.compat.torchao.prototype.quant_logger import quant_logger

        for name, value in (("counter", 0), ("file", None), ("folder", None)):
            monkeypatch.setattr(quant_logger._State, name, value)

    def test_parameters(self, capsys):
        from ao.compat.torchao.prototype.quant_logger import log_parameter_info

        log_parameter_info(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(",")[2] for line in lines] == [f" fqn='{n}.{p}'" for n in (0, 2) for p in ("weight", "bias")]

    def test_activations(self, capsys):
        from ao.compat.torchao.prototype.quant_logger import add_activation_loggers

        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        add_activation_loggers(model)
        with torch.no_grad():
            trace(model)(torch.ones(1, 16))
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[0] == "t=act, c=0, fqn='0.weight', op='linear', extra='MKN=1|16|32', max_abs=1.00, avg=1.00, std=0.00"
        )
        assert "fqn='2.weight', op='linear', extra='MKN=1|32|8'" in lines[1]

    def test_a_table_and_whole_tensors(self, tmp_path):
        import csv

        from ao.compat.torchao.prototype.quant_logger import (
            add_activation_loggers,
            enable_log_stats_to_file,
            enable_log_tensor_save_tensors_to_disk,
            reset_counter,
        )

        model = nn.Sequential(nn.Linear(16, 32))
        add_activation_loggers(model)
        enable_log_stats_to_file(tmp_path / "stats.csv")
        model(torch.full((2, 16), 3.0))
        rows = list(csv.DictReader((tmp_path / "stats.csv").read_text().splitlines()))
        assert [(row["fqn"], row["extra"], float(row["max_abs"])) for row in rows] == [("0.weight", "MKN=2|16|32", 3.0)]
        reset_counter()
        enable_log_tensor_save_tensors_to_disk(tmp_path / "tensors")
        model(torch.ones(2, 16))
        assert torch.equal(torch.load(tmp_path / "tensors" / "act_0_0.weight_linear.pt"), torch.ones(2, 16))
