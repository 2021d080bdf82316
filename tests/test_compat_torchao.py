"""`ao.compat.torchao`: every name imports, translations mean what they say, and the kinds of examples that its pages show run."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao
from ao import Float8, Intx
from ao.compat import torchao
from ao.compat.torchao import quantization as tq
from ao.compat.torchao.core.config import AOBaseConfig, Translated, config_from_dict, config_to_dict
from ao.compat.torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from ao.compat.torchao.quantization import (
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    compute_error,
    quantize_,
    register_quantize_module_handler,
)

ROOT = Path(__file__).parent.parent
NAMES = torchao.NAMES


def model(k: int = 128, n: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, 256), nn.ReLU(), nn.Linear(256, n)).eval()


def data(count: int = 3, k: int = 128) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, k) for _ in range(count)]


def error_of(quantized: nn.Module, x: torch.Tensor | None = None) -> float:
    x = data(1)[0] if x is None else x
    with torch.no_grad():
        return float(compute_error(model()(x), quantized(x)))


# names


def test_every_name_imports_and_says_what_it_is():
    assert len(NAMES) > 600
    for foreign, entry in NAMES.items():
        module, _, name = f"ao.compat.{foreign}".rpartition(".")
        value = getattr(importlib.import_module(module), name)
        room, _, leaf = entry.here.rpartition(".")
        here = getattr(importlib.import_module(room), leaf)
        assert (here is value) or not entry.same, foreign
        assert entry.same or entry.note or not (isinstance(value, type) or callable(value)), (
            f"{foreign} has no docstring"
        )


@pytest.mark.parametrize(
    "path",
    [
        "quantization.quantize_",
        "quantization.quant_api.int8_dynamic_activation_int4_weight",
        "quantization.quant_primitives.TorchAODType",
        "quantization.granularity.PerRow",
        "quantization.qat.Int8DynActInt4WeightQATQuantizer",
        "quantization.prototype.qat.api.FakeQuantizeConfig",
        "quantization.observer.AffineQuantizedMinMaxObserver",
        "quantization.autoquant.AQInt4G64WeightOnlyQuantizedLinearWeight",
        "quantization.GPTQ.Int4WeightOnlyGPTQQuantizer",
        "dtypes.nf4tensor.NF4Tensor",
        "dtypes.MarlinSparseLayout",
        "optim.CPUOffloadOptimizer",
        "float8.float8_linear.Float8Linear",
        "float8.float8_tensor_parallel.Float8ColwiseParallel",
        "sparsity.training.SemiSparseLinear",
        "prototype.low_bit_optim.AdamW4bit",
        "prototype.quantized_training.bitnet_training",
        "prototype.mx_formats.MXFPInferenceConfig",
        "prototype.smoothquant.insert_smooth_quant_observer_",
        "prototype.awq.AWQConfig",
        "prototype.hqq.triton_mixed_mm",
        "prototype.dtypes.UintxLayout",
        "utils.TorchAOBaseTensor",
        "kernel.intmm.int_matmul",
    ],
)
def test_the_table_has(path):
    assert f"torchao.{path}" in NAMES


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_what_importing_it_imports():
    new = "print(sorted(m for m in set(sys.modules) - before if m.startswith('ao')))"
    first = f"import sys, ao; before = set(sys.modules); import ao.compat.torchao; {new}"
    light = "print([m in sys.modules for m in ('ao.optim', 'ao.train', 'torch._dynamo')])"
    same = "print(Config.registry['Int4WeightOnlyConfig'] is ao.Int4WeightOnlyConfig, 'compat' in ao.__all__)"
    code = f"{first}; import ao.compat.torchao.quantization; from ao import Config; {light}; {same}"
    assert python(code).split("\n") == ["['ao.compat', 'ao.compat.torchao']", "[False, False, False]", "True False"]


# translations


CASES = [
    (Int4WeightOnlyConfig(group_size=32), ao.Int4WeightOnlyConfig(32, unsupported="skip")),
    (
        Int4WeightOnlyConfig(
            64, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq", version=2
        ),
        ao.Int4WeightOnlyConfig(64, algorithm="hqq", unsupported="skip"),
    ),
    (tq.int4_weight_only(use_hqq=True), ao.Int4WeightOnlyConfig(algorithm="hqq", unsupported="skip")),
    (tq.int8_weight_only(group_size=32), ao.Int8WeightOnlyConfig(32, unsupported="skip")),
    (
        Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.ASYMMETRIC, granularity=[PerRow(), PerTensor()]
        ),
        ao.Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.ASYMMETRIC, granularity=(PerRow(), PerTensor()), unsupported="skip"
        ),
    ),
    (
        tq.int8_dynamic_activation_int4_weight(group_size=16, mapping_type=MappingType.ASYMMETRIC),
        ao.Int8DynamicActivationInt4WeightConfig(16, mapping_type=MappingType.ASYMMETRIC, unsupported="skip"),
    ),
    (
        Int8DynamicActivationIntxWeightConfig(torch.int3, PerGroup(64), weight_scale_dtype=torch.bfloat16),
        ao.SpecConfig(
            Intx(3, (1, 64), symmetric=True, scale_dtype="bfloat16", act=Intx(8, symmetric=False)), unsupported="skip"
        ),
    ),
    (
        tq.IntxWeightOnlyConfig(tq.TorchAODType.INT4, PerAxis(0), intx_choose_qparams_algorithm="hqq_scale_only"),
        ao.IntxWeightOnlyConfig(torch.int4, PerAxis(0), algorithm="hqq", unsupported="skip"),
    ),
    (tq.uintx_weight_only(torch.uint5, group_size=32), ao.UIntXWeightOnlyConfig(torch.uint5, 32, unsupported="skip")),
    (tq.Float8WeightOnlyConfig(), ao.Float8WeightOnlyConfig(unsupported="skip")),
    (
        tq.float8_dynamic_activation_float8_weight(
            granularity=PerRow(), mm_config=tq.Float8MMConfig(use_fast_accum=True)
        ),
        ao.Float8DynamicActivationFloat8WeightConfig(granularity=(PerRow(), PerRow()), unsupported="skip"),
    ),
    (
        tq.Float8DynamicActivationFloat8WeightConfig(granularity=[PerBlock([1, 128]), PerBlock([128, 128])]),
        ao.SpecConfig(Float8("e4m3", (128, 128), act=Float8("e4m3", (1, 128))), unsupported="skip"),
    ),
    (
        tq.Float8DynamicActivationInt4WeightConfig(),
        ao.SpecConfig(Intx(4, (1, 128), symmetric=True, act=Float8()), unsupported="skip"),
    ),
    (
        tq.gemlite_uintx_weight_only(group_size=64, mode="dynamic", contiguous=True),
        ao.GemliteUIntXWeightOnlyConfig(64, mode="dynamic", unsupported="skip"),
    ),
    (
        PrototypeInt4WeightOnlyConfig(group_size=64),
        ao.Int4WeightOnlyConfig(64, zero_point_domain=tq.ZeroPointDomain.NONE, unsupported="skip"),
    ),
]


@pytest.mark.parametrize(("config", "ours"), CASES, ids=[type(c).__name__ for c, _ in CASES])
def test_translations(config, ours):
    assert config.to_ao() == ours
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    m = model()
    report = quantize_(m, config)
    assert len(report.rows) == 2 and error_of(m) > 8


def _sparse_int4():
    from ao.compat.torchao.dtypes import MarlinSparseLayout

    quantize_(model(), tq.int4_weight_only(layout=MarlinSparseLayout()))


def test_small_floats():
    from ao.compat.torchao.prototype.mx_formats import MXFPInferenceConfig, NVFP4InferenceConfig, NVFP4WeightOnlyConfig

    for config, spec in (
        (
            MXFPInferenceConfig(),
            ao.dtypes.FloatX(4, 3, scale_rule="rceil", act=ao.dtypes.FloatX(4, 3, scale_rule="rceil")),
        ),
        (NVFP4InferenceConfig(), dataclasses.replace(ao.NVFP4, act=ao.NVFP4)),
        (NVFP4WeightOnlyConfig(), ao.NVFP4),
        (tq.fpx_weight_only(3, 2), ao.FP6),
    ):
        m = model()
        quantize_(m, config)
        assert m[0].weight.spec == spec


def test_a_tensor_of_small_floats():
    from ao.compat.torchao.dtypes import PlainLayout, to_affine_quantized_fpx
    from ao.compat.torchao.dtypes.utils import FloatxTensorCoreLayout

    w = torch.randn(16, 64)
    q = to_affine_quantized_fpx(w, FloatxTensorCoreLayout(3, 2))
    assert q.spec == ao.FP6
    torch.testing.assert_close(q.dequantize(), ao.FP6.quantize(w).dequantize(), rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="FloatxTensorCoreLayout"):
        to_affine_quantized_fpx(w, PlainLayout())


def _sparsify():
    from ao.compat.torchao.sparsity import semi_sparse_weight, sparsify_

    sparsify_(model(), semi_sparse_weight())


@pytest.mark.parametrize(
    "use", [lambda: quantize_(model(), tq.int8_dynamic_activation_int8_semi_sparse_weight()), _sparse_int4, _sparsify]
)
def test_what_is_not_pruned_says_so(use):
    with pytest.raises(ValueError, match="groups of four"):
        use()


def test_sparsity():
    from ao.compat.torchao.dtypes import MarlinSparseLayout
    from ao.compat.torchao.sparsity import SupermaskLinear, WandaSparsifier, apply_fake_sparsity, sparsify_
    from ao.compat.torchao.sparsity.training import (
        SemiSparseLinear,
        swap_linear_with_semi_sparse_linear,
        swap_semi_sparse_linear_with_linear,
    )
    from ao.dtypes import Sparse24

    for config in (
        tq.int8_dynamic_activation_int8_semi_sparse_weight(),
        tq.int4_weight_only(layout=MarlinSparseLayout()),
    ):
        m = model(k=128)
        apply_fake_sparsity(m)
        assert sparsify_(m, config) is m and isinstance(m[0].weight.spec, Sparse24)
    m, x = model(), torch.randn(20, 128)
    w = m[0].weight.detach().clone()
    sparsifier = WandaSparsifier(0.5, semi_structured_block_size=4)
    sparsifier.prepare(m, [{"tensor_fqn": "0.weight"}])
    m(x)
    sparsifier.step()
    sparsifier.squash_mask()
    other = model()
    ao.sparsity.prune_(other, "wanda", filter_fn=lambda _, name: name == "0", calibration_data=[x])
    assert torch.equal(m[0].weight, other[0].weight) and not torch.equal(m[0].weight, w)
    swap_linear_with_semi_sparse_linear(m, {"2": SemiSparseLinear})
    assert type(m[2]) is SemiSparseLinear
    swap_semi_sparse_linear_with_linear(m)
    assert type(m[2]) is nn.Linear
    layer = SupermaskLinear(0.5, 4, False, True, 16, 8, bias=False)
    assert layer(torch.randn(2, 16)).shape == (2, 8) and layer.mask().sum() == 64
    assert type(SupermaskLinear.from_linear(m[0], 0.9, 32)) is SupermaskLinear


def test_a_shape_that_does_not_fit_is_passed_over_with_a_note():
    m = model(k=100)
    report = quantize_(m, Int4WeightOnlyConfig(group_size=64))
    assert [row.name for row in report.rows] == ["2.weight"]
    assert "0.weight" in report.skipped and "not a multiple" in report.skipped["0.weight"]


def test_what_is_quantized_already_stays():
    m = model()
    quantize_(m, Int4WeightOnlyConfig(32), lambda module, name: name == "0")
    quantize_(m, tq.int8_weight_only())
    assert [m[0].weight.spec.bits, m[2].weight.spec.bits] == [4, 8]
    assert isinstance(m[2].weight, tq.Int8Tensor) and isinstance(m[0].weight, tq.Int4Tensor)
    assert not isinstance(m[0].weight, tq.Int8Tensor)


def test_rules_by_name():
    m = model()
    report = quantize_(
        m,
        FqnToConfig({"0": Int4WeightOnlyConfig(32), "nowhere": None, "_default": Int8WeightOnlyConfig()}),
        filter_fn=None,
    )
    assert [m[0].weight.spec.bits, m[2].weight.spec.bits] == [4, 8]
    assert any("nowhere" in note for note in report.notes)
    m = model()
    quantize_(m, tq.ModuleFqnToConfig({"re:[02]": Int8WeightOnlyConfig(), "0": None}), filter_fn=None)
    assert not isinstance(m[0].weight, ao.QTensor) and m[2].weight.spec.bits == 8
    assert tq.fqn_matches_fqn_config("0", FqnToConfig({"re:[02]": None}))
    with pytest.raises(ValueError, match="leave filter_fn out"):
        quantize_(model(), FqnToConfig({"0": Int8WeightOnlyConfig()}), filter_fn=lambda module, name: True)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_static_activations_with_zero_points_and_scales_per_row(rows, asymmetric):
    x, m = data(1)[0], model()
    first = nn.Sequential(copy.deepcopy(m[0]))
    mapping = MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC
    block = (1, 128) if rows else x.shape
    scale, zero = tq.choose_qparams_affine(
        x, mapping, block, torch.int8, -128, 127, scale_dtype=torch.float32, zero_point_dtype=torch.int8, keepdim=True
    )
    quantize_(first, Int8StaticActivationInt8WeightConfig(scale, zero, granularity=PerRow()))
    codes = tq.quantize_affine(x, block, scale, zero, torch.int8)
    rounded = tq.dequantize_affine(codes, block, scale, zero, torch.int8)
    expected = F.linear(rounded, first[0].weight.dequantize(), first[0].bias)
    torch.testing.assert_close(first(x), expected, atol=1e-5, rtol=1e-5)
    assert compute_error(torch.compile(first, fullgraph=True, backend="aot_eager")(x), expected) > 80


# primitives


def test_primitives_by_their_formulas():
    x = torch.randn(4, 6, 10)
    scale, zero = tq.choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 6, 5), torch.int8)
    assert scale.shape == (4, 2) and zero.dtype == torch.int32 and not zero.any()
    torch.testing.assert_close(scale, x.reshape(4, 6, 2, 5).abs().amax((1, 3)) / 127.5, atol=0, rtol=0)
    kept, _ = tq.choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 6, 5), torch.int8, keepdim=True)
    assert kept.shape == (4, 1, 2)
    lo, hi = torch.tensor([-1.0]), torch.tensor([3.0])
    scale, zero = tq.choose_qparams_affine_with_min_max(lo, hi, MappingType.ASYMMETRIC, (), torch.uint8)
    assert scale.item() == pytest.approx(4 / 255) and zero.item() == 64
    w = torch.randn(4, 64)
    domain = tq.ZeroPointDomain.FLOAT
    scale, zero = tq.choose_qparams_affine(
        w, MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15, preserve_zero=False, zero_point_domain=domain
    )
    q = tq.quantize_affine(w, (1, 32), scale, zero, torch.int32, 0, 15, domain)
    assert q.dtype == torch.int32 and int(q.min()) == 0 and int(q.max()) == 15
    back = tq.dequantize_affine(q, (1, 32), scale, zero, torch.int32, 0, 15, domain)
    assert (back - w).abs().max() <= scale.max() * 0.51
    fake = tq.fake_quantize_affine(w, (1, 32), scale, zero, torch.int32, 0, 15, domain)
    torch.testing.assert_close(fake, back)


@pytest.mark.parametrize(("ebits", "mbits"), [(3, 2), (2, 2), (2, 1)])
def test_floats_of_few_bits(ebits, mbits):
    codes = torch.arange(2 ** (1 + ebits + mbits), dtype=torch.uint8).reshape(1, -1)
    one = torch.ones(1)
    numbers = tq.dequantize_affine_floatx(codes, one, ebits, mbits)
    assert numbers.unique().numel() == codes.numel() - 1  # 0 and -0
    again = tq.quantize_affine_floatx(numbers, one, ebits, mbits)
    half = codes.numel() // 2
    assert torch.equal(again[0, :half], codes[0, :half]) and torch.equal(again[0, half + 1 :], codes[0, half + 1 :])


# the kinds of examples of the pages


def test_own_config_and_own_tensor():
    from ao.compat.torchao.utils import TorchAOBaseTensor

    class Halved(TorchAOBaseTensor):
        tensor_data_names = ("half",)
        tensor_attribute_names = ("factor",)

        @staticmethod
        def __new__(cls, half, factor):
            return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)

        def __init__(self, half, factor):
            self.half, self.factor = half, factor

    @Halved.implements_torch_function(F.linear)
    def linear(func, types, args, kwargs):
        x, w, bias = args
        return F.linear(x, w.half * w.factor, bias)

    @dataclass
    class HalvedConfig(AOBaseConfig):
        factor: float = 2.0

    @register_quantize_module_handler(HalvedConfig)
    def transform(module, config):
        module.weight = nn.Parameter(Halved(module.weight.detach() / config.factor, config.factor), requires_grad=False)
        return module

    m, x = model(), data(1)[0]
    quantize_(m, HalvedConfig(4.0))
    assert type(m[0].weight.data) is Halved and error_of(m) > 100
    torch.testing.assert_close(torch.compile(m, backend="aot_eager", fullgraph=True)(x), m(x))
    assert copy.deepcopy(m)[0].weight.factor == 4.0
    m = model()
    quantize_(m, FqnToConfig({"0": HalvedConfig(2.0), "2": Int8WeightOnlyConfig()}), filter_fn=None)
    assert type(m[0].weight.data) is Halved and m[2].weight.spec.bits == 8
    with pytest.raises(NotImplementedError, match="name its layer"):
        quantize_(model(), FqnToConfig({"0.weight": HalvedConfig(2.0)}), filter_fn=None)
    with pytest.raises(TypeError, match="register_quantize_module_handler"):
        quantize_(model(), type("NoHandlerConfig", (AOBaseConfig,), {})())
    replaced = model()
    quantize_(replaced, lambda module: nn.Identity() if module.in_features == 256 else module)
    assert isinstance(replaced[2], nn.Identity)


def test_a_subclass_of_ones_own_tensor_knows_what_its_bases_did():
    """The last base before the others; what a base learns later, and what is said nowhere, is an error."""
    from ao.compat.torchao.utils import TorchAOBaseTensor

    class First(TorchAOBaseTensor):
        @staticmethod
        def __new__(cls, shape):
            return torch.Tensor._make_wrapper_subclass(cls, shape)

    class Second(First):
        pass

    First.implements(torch.ops.aten.neg.default)(lambda func, types, args, kwargs: torch.tensor(1))
    Second.implements(torch.ops.aten.neg.default)(lambda func, types, args, kwargs: torch.tensor(2))

    class Both(Second, First):
        pass

    class Child(Second):
        pass

    First.implements(torch.ops.aten.relu.default)(lambda func, types, args, kwargs: torch.tensor(3))
    assert torch.ops.aten.neg.default(Child((2,))) == 2 and torch.ops.aten.neg.default(Both((2,))) == 1
    assert torch.ops.aten.relu.default(First((2,))) == 3
    with pytest.raises(
        NotImplementedError, match=r"Child does not say what aten.relu.default means \(arg_types: Child\)"
    ):
        torch.ops.aten.relu.default(Child((2,)))


def test_stochastic_rounding_of_a_shard():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ao.compat.torchao.optim.quant_utils import _fp32_to_bf16_sr

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        x = torch.full((4, 4096), 1.001)
        found = _fp32_to_bf16_sr(DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()]))
        assert isinstance(found, DTensor) and found.dtype == torch.bfloat16
        assert found.to_local().float().mean().item() == pytest.approx(1.001, abs=2e-4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["base", "parts", "old", "quantizer"])
def test_quantization_aware_training(how):
    from ao.compat.torchao.quantization import qat

    act = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = qat.FakeQuantizeConfig(torch.int4, group_size=32)
    weight.group_size = 64
    base = tq.Int8DynamicActivationInt4WeightConfig(group_size=64)
    m, x = model().train(), data(1)[0]
    quantizer = qat.Int8DynActInt4WeightQATQuantizer(groupsize=64)
    if how == "quantizer":
        m = quantizer.prepare(m)
    else:
        step = {
            "base": qat.QATConfig(base, step="prepare"),
            "parts": qat.QATConfig(activation_config=act, weight_config=weight),
            "old": qat.IntXQuantizationAwareTrainingConfig(act, weight),
        }[how]
        quantize_(m, step)
    assert isinstance(m[0], qat.FakeQuantizedLinear) and m[0].weight_fake_quantizer.spec.bits == 4
    optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
    m(x).square().mean().backward()
    optimizer.step()
    trained = m(x).detach()
    m.apply(qat.linear.disable_linear_fake_quant)
    assert not torch.equal(m(x), trained)
    m.apply(qat.linear.enable_linear_fake_quant)
    if how == "quantizer":
        m = quantizer.convert(m)
    elif how == "old":
        quantize_(m, qat.FromIntXQuantizationAwareTrainingConfig())
        assert type(m[0]) is nn.Linear
        quantize_(m, base)
    else:
        quantize_(m, qat.QATConfig(base, step="convert"))
    assert isinstance(m[0].weight, ao.QTensor) and torch.equal(m(x), trained)


def test_quantization_aware_training_of_ranges_embeddings_and_nothing():
    from ao.compat.torchao.quantization import qat

    learned = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    m, x = model(), data(1)[0]
    quantize_(m, qat.QATConfig(weight_config=learned))
    with pytest.raises(ValueError, match="initialize_fake_quantizers"):
        m(x)
    qat.initialize_fake_quantizers(m, (x,))
    before = m[0].weight_fake_quantizer.scale.detach().clone()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(m[0].weight_fake_quantizer.scale, before)
    expected = m[0].weight_fake_quantizer(m[0].weight).detach()
    quantize_(m, qat.QATConfig(Int4WeightOnlyConfig(32), step="convert"))
    torch.testing.assert_close(m[0].weight.dequantize(), expected)

    both = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
    composed = qat.ComposableQATQuantizer(
        [qat.Int8DynActInt4WeightQATQuantizer(32), qat.Int4WeightOnlyEmbeddingQATQuantizer(32)]
    )
    out = composed.prepare(both)(torch.arange(5))
    torch.testing.assert_close(composed.convert(both)(torch.arange(5)), out)
    assert isinstance(both[0].weight, ao.QTensor)

    plain = model()
    quantize_(plain, qat.IntXQuantizationAwareTrainingConfig())
    assert torch.equal(plain(x), model()(x))
    quantize_(plain, qat.from_intx_quantization_aware_training())
    for bad in ({}, {"base_config": learned}, {"step": "later", "weight_config": learned}):
        with pytest.raises(ValueError, match="QATConfig"):
            qat.QATConfig(**bad)
    with pytest.raises(ValueError, match="embedding"):
        quantize_(
            both,
            qat.QATConfig(activation_config=learned, weight_config=learned),
            lambda m, _: isinstance(m, nn.Embedding),
        )


def test_low_bit_optimizers_and_offload():
    from ao.compat.torchao.optim import AdamW8bit, _AdamW
    from ao.compat.torchao.prototype.low_bit_optim import CPUOffloadOptimizer
    from ao.compat.torchao.prototype.low_bit_optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap
    from ao.compat.torchao.prototype.low_bit_optim.subclass_8bit import OptimState8bit

    m = model()
    optimizer = AdamW8bit(m.parameters(), lr=1e-3, compile=False)
    m(data(1)[0]).sum().backward()
    optimizer.step()
    assert any(isinstance(t, OptimState8bit) for state in optimizer.state.values() for t in state.values())
    assert _AdamW is ao.optim.AdamW and CPUOffloadOptimizer is ao.optim.CPUOffloadOptimizer
    table = torch.tensor(create_dynamic_map(signed=True))
    x = torch.rand(256) * 2 - 1
    assert torch.equal(quantize_8bit_with_qmap(x, table), (x[:, None] - table).abs().argmin(1).to(torch.uint8))
    zeros = OptimState8bit.zeros((64, 256))
    assert not zeros[:32].dequantize().any()


@pytest.mark.parametrize("which", ["int8_weight_only", "int8_mixed_precision", "bitnet", "ao"])
def test_quantized_training(which):
    from ao.compat.torchao.prototype import quantized_training as qt

    config = {
        "int8_weight_only": qt.int8_weight_only_quantized_training(),
        "int8_mixed_precision": qt.int8_mixed_precision_training(qt.Int8MixedPrecisionTrainingConfig(module_swap=True)),
        "bitnet": qt.bitnet_training(),
        "ao": ao.train.int8_weight_only_quantized_training(),
    }[which]
    m, x = model().train(), data(1)[0]
    report = (ao.quantize_ if which == "ao" else quantize_)(m, config)
    assert len(report.rows) == 2
    before = m[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False)
    m(x).square().mean().backward()
    optimizer.step()
    values = [t.dequantize() if isinstance(t, ao.QTensor) else t for t in (before, m[0].weight.detach())]
    assert not torch.equal(*values)


def test_float8_training():
    from ao.compat.torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from ao.compat.torchao.float8 import _auto_filter_for_recipe as auto_filter
    from ao.compat.torchao.float8.float8_linear import Float8Linear

    m, x = model().train(), data(1)[0]
    assert convert_to_float8_training(m, module_filter_fn=auto_filter("tensorwise", ["0"])) is m
    assert not isinstance(m[0], Float8Linear)  # too small for it
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(m, module_filter_fn=lambda _, name: name == "0", config=config)
    assert isinstance(m[0], Float8Linear) and not isinstance(m[2], Float8Linear)
    m(x).sum().backward()
    layer = Float8Linear.from_float(
        nn.Linear(32, 32), Float8LinearConfig(emulate=True, force_recompute_fp8_weight_in_bwd=True)
    )
    assert isinstance(layer, Float8Linear) and layer.weight.grad is None


@pytest.mark.parametrize("config", [Int4WeightOnlyConfig(32), Int8DynamicActivationIntxWeightConfig(torch.int4)])
def test_serialization(config):
    from ao.compat.torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )
    from ao.compat.torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

    m, x = model(), data(1)[0]
    quantize_(m, config)
    buffer = io.BytesIO()
    torch.save(m.state_dict(), buffer)
    buffer.seek(0)
    with torch.device("meta"):
        loaded = model()
    loaded.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(loaded(x), m(x))
    tensors, metadata = flatten_tensor_state_dict(m.state_dict())
    assert "0._weight_qdata" in tensors and all(type(t) is torch.Tensor for t in tensors.values())
    assert is_metadata_torchao(metadata) and not is_metadata_torchao({"format": "pt"})
    state, left = unflatten_tensor_state_dict(tensors, metadata)
    again = model()
    again.load_state_dict(state, assign=True)
    assert not left and torch.equal(again(x), m(x))


def test_autoquant():
    from ao.compat.torchao.quantization.autoquant import (
        DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST,
        AQDefaultLinearWeight,
        AQInt8WeightOnlyQuantizedLinearWeight,
    )

    w = torch.randn(64, 64)
    assert isinstance(AQInt8WeightOnlyQuantizedLinearWeight.from_float(w), AQInt8WeightOnlyQuantizedLinearWeight)
    classes = [AQDefaultLinearWeight, AQInt8WeightOnlyQuantizedLinearWeight]
    m = torchao.autoquant(model(), qtensor_class_list=classes, manual=True, set_inductor_config=False, cache=False)
    m(data(1)[0])
    m.finalize_autoquant()
    assert error_of(m) > 20
    unchanged = model()
    assert torchao.autoquant(unchanged, qtensor_class_list=DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST) is unchanged


def test_nf4_and_qlora():
    from ao.compat.torchao.dtypes import NF4Tensor, to_nf4
    from ao.compat.torchao.dtypes.nf4tensor import linear_nf4, nf4_weight_only

    w = torch.randn(64, 512)
    q = to_nf4(w, block_size=64, scaler_block_size=4)
    assert isinstance(q, NF4Tensor) and isinstance(q[:32], NF4Tensor)
    assert (q.block_size, q.scaler_block_size, q.n_blocks) == (64, 4, 512)
    assert type(q.to(torch.bfloat16)) is torch.Tensor and q.to(torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(q.to("cpu"), NF4Tensor) and compute_error(w, q.get_original_weight()) > 18
    x = torch.randn(2, 512, requires_grad=True)
    adapter = nn.Linear(512, 64, bias=False)
    (linear_nf4(x, q) + adapter(x)).sum().backward()
    torch.testing.assert_close(x.grad, (q.get_original_weight() + adapter.weight).sum(0).expand(2, -1).detach())
    m = model()
    quantize_(m, nf4_weight_only())
    assert isinstance(m[0].weight, NF4Tensor) and error_of(m) > 15


@pytest.mark.parametrize(
    "which", ["awq", "old awq", "smoothquant", "static", "old smoothquant", "oldest", "gptq", "quantizer"]
)
def test_recipes_in_two_steps(which, tmp_path):
    from ao.compat.torchao.prototype.awq import AWQConfig, AWQObservedLinear, awq_uintx, insert_awq_observer_
    from ao.compat.torchao.prototype.gptq import GPTQConfig
    from ao.compat.torchao.prototype.smoothquant import (
        SmoothQuantConfig,
        SmoothQuantObservedLinear,
        insert_smooth_quant_observer_,
        load_smooth_quant_recipe,
        save_smooth_quant_recipe,
        smooth_quant,
    )
    from ao.compat.torchao.quantization.GPTQ import Int4WeightOnlyGPTQQuantizer, MultiTensor

    m, batches = model(), data()
    int4 = Int4WeightOnlyConfig(32)

    def run(prepare, convert, filter_fn=None):
        prepare()
        for x in batches:
            m(x)
        if which == "old smoothquant":
            save_smooth_quant_recipe(m, tmp_path / "recipe")
        convert() if filter_fn is None else quantize_(m, convert(), filter_fn)

    if which in ("awq", "smoothquant", "static"):
        static = (
            Int8StaticActivationInt8WeightConfig() if which == "static" else Int8DynamicActivationInt8WeightConfig()
        )
        base, kind = (int4, AWQConfig) if which == "awq" else (static, SmoothQuantConfig)
        run(lambda: quantize_(m, kind(base, step="prepare")), lambda: quantize_(m, kind(base, step="convert")))
    elif which == "gptq":
        run(lambda: quantize_(m, GPTQConfig("observe", int4)), lambda: quantize_(m, GPTQConfig("convert", int4)))
    elif which == "old awq":
        run(
            lambda: insert_awq_observer_(m, 3, 16, torch.uint4, group_size=32),
            lambda: awq_uintx(torch.uint4, 32),
            lambda layer, _: isinstance(layer, AWQObservedLinear),
        )
    elif which == "old smoothquant":
        run(
            lambda: insert_smooth_quant_observer_(m, 0.5),
            smooth_quant,
            lambda x, _: isinstance(x, SmoothQuantObservedLinear),
        )
        again = model()
        load_smooth_quant_recipe(again, tmp_path / "recipe")
        assert torch.equal(again(batches[0]), m(batches[0]))
    elif which == "oldest":
        run(lambda: tq.swap_linear_with_smooth_fq_linear(m), lambda: tq.smooth_fq_linear_to_inference(m))
    else:
        Int4WeightOnlyGPTQQuantizer(groupsize=32).quantize(m, MultiTensor(batches))
    assert all(isinstance(m[i].weight, ao.QTensor) for i in (0, 2)) and error_of(m) > 15
    assert not m._forward_pre_hooks


def test_a_recipe_that_saw_no_data_says_so():
    from ao.compat.torchao.prototype.awq import AWQConfig

    m = model()
    with pytest.raises(ValueError, match="not prepared"):
        quantize_(m, AWQConfig(Int4WeightOnlyConfig(32), step="convert"))
    quantize_(m, AWQConfig(Int4WeightOnlyConfig(32), step="prepare"))
    with pytest.raises(ValueError, match="was not called"):
        quantize_(m, AWQConfig(Int4WeightOnlyConfig(32), step="convert"))


def test_awq_weights_for_loading():
    from ao.compat.torchao.prototype.awq import AWQConfig

    base, m = Int4WeightOnlyConfig(32), model()
    quantize_(m, AWQConfig(base, step="prepare"))
    m(data(1)[0])
    quantize_(m, AWQConfig(base, step="convert"))
    other = model()
    quantize_(other, AWQConfig(base, step="prepare_for_loading"))
    other[0].weight.copy_(m[0].weight)
    other[2].weight.copy_(m[2].weight)
    torch.testing.assert_close(other(data(1)[0]), m(data(1)[0]))


def test_hqq():
    plain, hqq = (copy.deepcopy(model()[0]) for _ in range(2))
    quantize_(plain, tq.uintx_weight_only(torch.uint3, group_size=32))
    quantize_(hqq, tq.uintx_weight_only(torch.uint3, group_size=32, use_hqq=True))
    w = model()[0].weight
    assert compute_error(w, hqq.weight.dequantize()) > compute_error(w, plain.weight.dequantize())
    q, scale, zero, shape = tq.choose_qparams_and_quantize_affine_hqq(w.detach(), 4, 32, device="cpu")
    back = tq.dequantize_affine(q.int(), (1, 32), scale, zero, torch.int32, 0, 15, tq.ZeroPointDomain.FLOAT)
    assert shape == w.shape and compute_error(w, back) > 20


def test_static_quantization_with_observers():
    """As its tutorial builds it: layers with observers, run, and layers over quantized tensors in their place."""
    from ao.compat.torchao.dtypes import AffineQuantizedTensor, to_affine_quantized_intx_static
    from ao.compat.torchao.quantization.observer import AffineQuantizedMinMaxObserver, AffineQuantizedMSEObserver
    from ao.compat.torchao.quantization.quant_api import _replace_with_custom_fn_if_matches_filter

    class Observed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            kind = {"eps": 1e-6, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
            asymmetric = MappingType.ASYMMETRIC
            self.act = AffineQuantizedMinMaxObserver(asymmetric, torch.uint8, PerTensor(), **kind)
            self.weight = AffineQuantizedMSEObserver(
                asymmetric, torch.uint8, PerAxis(0), steps=20, run_once=True, **kind
            )

        def forward(self, x):
            self.weight(self.linear.weight)
            return self.linear(self.act(x))

    class Quantized(nn.Module):
        def __init__(self, observed):
            super().__init__()
            w, bias = observed.linear.weight.detach(), observed.linear.bias
            self.act = observed.act.calculate_qparams()
            self.bias = bias
            self.weight = to_affine_quantized_intx_static(
                w, *observed.weight.calculate_qparams(), (1, w.shape[1]), torch.uint8
            )
            assert isinstance(self.weight, AffineQuantizedTensor)

        def forward(self, x):
            return F.linear(to_affine_quantized_intx_static(x, *self.act, x.shape, torch.uint8), self.weight, self.bias)

    m = model()
    _replace_with_custom_fn_if_matches_filter(m, Observed, lambda module, _: isinstance(module, nn.Linear))
    for x in data():
        m(x)
    _replace_with_custom_fn_if_matches_filter(m, Quantized, lambda module, _: isinstance(module, Observed))
    assert isinstance(m[0], Quantized) and error_of(m) > 25
    observer = AffineQuantizedMinMaxObserver.with_args(MappingType.SYMMETRIC, torch.int8, PerTensor())()
    with pytest.raises(AssertionError, match="seen nothing"):
        observer.calculate_qparams()


def test_observers_in_weights_and_weights_that_quantize_what_they_meet():
    from ao.compat.torchao.dtypes import to_affine_quantized_intx
    from ao.compat.torchao.quantization.observer import AffineQuantizedMinMaxObserver

    x, m = data(1)[0], model()
    kind = AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, PerTensor())
    tq.quant_api.insert_observers_(m, kind, None)
    torch.testing.assert_close(m(x), model()(x))
    assert m[0].weight.input_observer.max_val == x.max() and m[0].weight.weight_observer is None
    w = to_affine_quantized_intx(model()[0].weight.detach(), MappingType.SYMMETRIC, (1, 128), torch.int8)
    both = tq.to_linear_activation_quantized(
        w, lambda t: to_affine_quantized_intx(t, MappingType.SYMMETRIC, (1, t.shape[-1]), torch.int8)
    )
    assert isinstance(both, tq.LinearActivationQuantizedTensor) and both.spec.act == Intx(8)
    scaled = tq.to_weight_tensor_with_linear_activation_scale_metadata(w, torch.full((128,), 2.0))
    torch.testing.assert_close(F.linear(x, scaled), F.linear(x / 2, w))


def test_convolutions_of_1x1_and_measuring(tmp_path):
    from ao.compat.torchao.kernel import safe_int_mm
    from ao.compat.torchao.utils import benchmark_model, find_multiple, get_model_size_in_bytes, profiler_runner

    x = torch.randn(2, 32, 4, 4)
    m = nn.Sequential(nn.Conv2d(32, 16, 1), nn.Conv2d(16, 8, 3))
    expected = m(x)
    tq.swap_conv2d_1x1_to_linear(m)
    torch.testing.assert_close(m(x), expected)
    before = get_model_size_in_bytes(m)
    assert len(quantize_(m, Int8WeightOnlyConfig()).rows) == 1 and get_model_size_in_bytes(m) < before
    assert benchmark_model(m, 2, (x,)) > 0 and find_multiple(10, 4, 6) == 12
    profiler_runner(str(tmp_path / "trace.json"), m, x)
    assert (tmp_path / "trace.json").exists()
    for k in (5, 1):
        a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, k), (k, 7)))
        assert torch.equal(safe_int_mm(a, b), a.int() @ b.int())


def test_configs_from_files_are_those_of_known_packages(monkeypatch):
    from ao.compat.torchao.core import config as module

    @dataclass
    class MineConfig(AOBaseConfig):
        value: int = 1

    saved = json.loads(json.dumps(config_to_dict(MineConfig(3))))
    with pytest.raises(ValueError, match="ALLOWED_AO_MODULES"):
        config_from_dict(saved)
    monkeypatch.setattr(module, "ALLOWED_AO_MODULES", {__name__})
    assert config_from_dict(saved) == MineConfig(3)
    assert issubclass(Int4WeightOnlyConfig, Translated)


def test_float8_tensors_by_hand():
    from ao.compat.torchao.float8.float8_training_tensor import (
        Float8TrainingTensor,
        ScalingGranularity,
        hp_tensor_and_scale_to_float8,
        hp_tensor_to_float8_dynamic,
    )
    from ao.compat.torchao.float8.float8_utils import fp8_tensor_statistics, tensor_to_scale

    x = torch.randn(3, 5, 16, requires_grad=True)
    scale = tensor_to_scale(x, torch.float8_e4m3fn)
    q = hp_tensor_and_scale_to_float8(x, scale, torch.float8_e4m3fn)
    gradient = torch.randn(3, 5, 16)
    q.to_original_precision().backward(gradient)
    assert isinstance(q, Float8TrainingTensor) and torch.equal(x.grad, gradient)
    again = Float8TrainingTensor(q.qdata.detach(), scale, torch.float32)
    assert torch.equal(again.to_original_precision(), q.to_original_precision())
    by_row = hp_tensor_to_float8_dynamic(
        x, torch.float8_e4m3fn, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=0
    )
    assert by_row.scale.shape == (1, 5, 16)
    ones = hp_tensor_and_scale_to_float8(torch.ones(4, 4), torch.tensor(1e9), torch.float8_e4m3fn)
    assert fp8_tensor_statistics(ones) == (0, 16)


def test_float8_layers_are_of_its_class():
    from ao.compat.torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from ao.compat.torchao.float8.float8_linear import Float8Linear
    from ao.train import convert_from_low_precision_training

    ragged = convert_to_float8_training(nn.Sequential(nn.Linear(3, 3)), config=Float8LinearConfig(emulate=True))
    assert type(ragged[0]) is Float8Linear and ragged[0].linear_mm_config.output.emulate
    assert "i:dyn_ten_e4m3,w:dyn_ten_e4m3,go:dyn_ten_e5m2" in repr(ragged)
    ragged(torch.randn(2, 3)).sum().backward()
    assert ragged[0].weight.grad.shape == (3, 3)
    assert type(convert_from_low_precision_training(ragged)[0]) is nn.Linear
    odd = nn.Linear(16, 16)
    odd.child = nn.Linear(16, 16)
    with pytest.raises(AssertionError, match="root nn.Linear with children"):
        convert_to_float8_training(odd)


def test_a_smoothquant_layer_converts_by_itself():
    x, layer = data(1)[0], model()[0]
    expected = layer(x)
    smooth = tq.SmoothFakeDynamicallyQuantizedLinear.from_float(layer, alpha=0.25)
    assert torch.equal(smooth(x), expected)
    smooth.to_inference()
    assert compute_error(expected, smooth(x)) > 35 and not hasattr(smooth, "to_inference")


def test_observers_of_smoothquant():
    """One keeps all inputs, one a number per channel, which sees the data twice for its range."""
    from ao.compat.torchao.prototype.smoothquant import RunningAbsMaxSmoothQuantObserver, SmoothQuantObserver

    weight, batches = torch.randn(8, 16), [torch.randn(3, 5, 16) * (1 + torch.arange(16)) for _ in range(3)]
    whole, running = SmoothQuantObserver(weight, 0.25), RunningAbsMaxSmoothQuantObserver(weight, 0.25)
    for observer in (whole, running):
        with pytest.raises(AssertionError, match="has seen no data"):
            observer.calculate_qparams()
        for batch in batches:
            assert observer(batch) is batch
    x = torch.cat(batches).flatten(0, -2)
    expected = x.abs().amax(0) ** 0.25 / weight.abs().amax(0) ** 0.75
    torch.testing.assert_close(running.compute_smoothing_factor(), expected, rtol=1e-5, atol=0)
    for batch in batches:
        running(batch)
    low, high = (x / expected).aminmax()
    for kwargs, scale, zero in [
        ({}, max(-low, high) / 127.5, 0),
        (
            {"quant_min": 0, "quant_max": 255, "is_symmetric": False},
            (high - low) / 255,
            (-low / ((high - low) / 255)).round(),
        ),
    ]:
        for observer in (whole, running):
            found = observer.calculate_qparams(kwargs)
            torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=0)
            assert found[1].item() == pytest.approx(float(scale), rel=1e-4) and found[2] == zero


def test_mx_training_by_recipe_names():
    from ao.compat.torchao.prototype.mx_formats import MXLinearConfig

    m, x = model().train(), torch.randn(32, 128)
    quantize_(m, MXLinearConfig.from_recipe_name("mxfp4_emulated"))
    m(x).sum().backward()
    assert m[0].recipe.output.a == ao.dtypes.FloatX(2, 1) and m[0].weight.grad is not None
    assert MXLinearConfig.from_recipe_name("mxfp8_cublas_rceil").recipe().output.a.scale_rule == "rceil"
    with pytest.raises(ValueError, match="mxfp8_emulated"):
        MXLinearConfig.from_recipe_name("float8")
    with pytest.raises(ValueError, match="elem_dtype must be one of"):
        MXLinearConfig(elem_dtype=torch.int8).recipe()
