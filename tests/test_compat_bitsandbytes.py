"""`ao.compat.bitsandbytes`: names, and the numbers that bitsandbytes 0.50.2 gives for the same data, here as literals."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ao
import ao.compat.bitsandbytes as bnb
from ao.compat.bitsandbytes.names import NAMES

F = bnb.functional
I = torch.arange(256.0)  # noqa: E741
X = (torch.sin(I * 1.7) * (1 + I % 5) / 4).view(2, 128)
INPUT = torch.cos(torch.arange(128.0) * 0.3).view(1, 128)


def filled(layer: nn.Module, weight: torch.Tensor = X) -> nn.Module:
    layer.load_state_dict({"weight": weight.clone()}, strict=False)
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there(name):
    value = bnb
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__


def test_import_paths():
    for path in ("nn.modules", "nn", "optim", "functional"):
        importlib.import_module(f"ao.compat.bitsandbytes.{path}")


def test_nothing_of_it_comes_with_ao():
    code = (
        "import sys, ao, ao.optim, ao.train; assert not [m for m in sys.modules if m.startswith('ao.compat')];"
        "import ao.compat.quanto, ao.compat.bitsandbytes;"
        "assert not {'transformers', 'diffusers', 'safetensors', 'triton', 'torch._dynamo'} & set(sys.modules);"
        "assert not hasattr(ao, 'Linear4bit') and 'Quantized4bit' not in ao.Spec.registry"
    )
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], check=True, cwd=Path(__file__).parent.parent
    )


# functional.


@pytest.mark.parametrize(
    ("quant_type", "octets", "total", "values"),
    [
        (
            "nf4",
            [124, 81, 201, 67, 236, 86, 214, 8],
            15746,
            [0.0, 0.5502581000328064, -0.23070299625396729, -0.8692470788955688],
        ),
        (
            "fp4",
            [4, 234, 86, 252, 36, 233, 46, 177],
            17417,
            [0.0, 0.4161908030509949, -0.20809540152549744, -0.8323816061019897],
        ),
    ],
)
def test_four_bits(quant_type, octets, total, values):
    codes, state = F.quantize_4bit(X, quant_type=quant_type)
    assert codes.shape == (128, 1) and codes.dtype == torch.uint8
    assert codes.flatten()[:8].tolist() == octets and codes.sum() == total
    largest = [1.2485723495483398, 1.2373366355895996, 1.2492547035217285, 1.2497167587280273]
    assert state.absmax.tolist() == largest
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (X.shape, X.dtype, 64, quant_type)
    assert F.dequantize_4bit(codes, state).flatten()[:4].tolist() == values
    assert torch.equal(F.dequantize_4bit(codes, absmax=state.absmax, out=torch.empty(2, 128), quant_type=quant_type),
                       F.dequantize_4bit(codes, state))  # fmt: skip
    same, _ = {"nf4": F.quantize_nf4, "fp4": F.quantize_fp4}[quant_type](X)
    assert torch.equal(same, codes)
    for storage in (torch.float32, torch.bfloat16, torch.int8):
        wide, told = F.quantize_4bit(X, quant_type=quant_type, quant_storage=storage)
        assert wide.dtype == storage and torch.equal(F.dequantize_4bit(wide, told), F.dequantize_4bit(codes, state))


def test_double_quantization():
    codes, state = F.quantize_4bit(X, quant_type="nf4", compress_statistics=True)
    assert state.nested and state.absmax.tolist() == [202, 0, 208, 211]
    assert state.offset.item() == pytest.approx(1.2462201118469238, abs=1e-6)
    assert state.state2.absmax.tolist() == pytest.approx([0.008883476257324219], abs=1e-6)
    values = F.dequantize_4bit(codes, state).flatten()[:4].tolist()
    assert values == pytest.approx([0.0, 0.5502460598945618, -0.23069794476032257, -0.8692280650138855], abs=1e-6)


@pytest.mark.parametrize("compress", [False, True])
def test_a_state_goes_to_a_dict_and_back(compress):
    codes, state = F.quantize_4bit(X.bfloat16(), quant_type="nf4", compress_statistics=compress)
    for packed in (False, True):
        found = state.as_dict(packed)
        assert all(isinstance(t, torch.Tensor) for t in found.values()) == packed
        again = F.QuantState.from_dict({f"layer.weight.{k}": v for k, v in found.items()}, "cpu")
        assert again == state and torch.equal(F.dequantize_4bit(codes, again), F.dequantize_4bit(codes, state))
    assert state[1] == X.shape and state[5] == "nf4" and state != F.quantize_4bit(X)[1]
    with pytest.raises(ValueError, match="lacks"):
        F.QuantState.from_dict({"absmax": state.absmax}, "cpu")


def test_any_shape():
    odd = X.flatten()[:35]
    codes, state = F.quantize_4bit(odd, quant_type="nf4")
    assert codes.shape == (18, 1) and codes.flatten()[-3:].tolist() == [154, 35, 247]
    assert F.dequantize_4bit(codes, state).shape == (35,)


def test_eight_bits():
    codes, state = F.quantize_blockwise(X.flatten(), blocksize=64)
    # Of 0 they make the code 131, which is 2e-5 times the largest; 127 is 0.
    assert codes[:8].tolist() == [127, 212, 60, 18, 219, 195, 51, 44]
    wanted = [0.0, 0.5023552775382996, -0.18631041049957275, -0.9237484335899353]
    assert F.dequantize_blockwise(codes, state)[:4].tolist() == wanted
    assert torch.equal(
        F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=64), F.dequantize_blockwise(codes, state)
    )
    nested, told = F.quantize_blockwise(X, blocksize=64, nested=True)
    assert (F.dequantize_blockwise(nested, told) - X).abs().mean() < 0.02 and told.nested
    with pytest.raises(ValueError, match="quant_state or absmax"):
        F.dequantize_blockwise(codes)


@pytest.mark.parametrize(
    ("threshold", "codes", "largest", "columns"),
    [
        (0.0, [0, 50, -19, -94, 63, 20, -36, -47], [1.2490234375, 1.25], None),
        (1.2, [0, 53, -21, -99, 66, 21, 0, -50], [1.1865234375, 1.17578125], [6, 14, 41, 49, 56]),
    ],
)
def test_rows_of_int8(threshold, codes, largest, columns):
    found, maxima, outliers = F.int8_vectorwise_quant(X.half(), threshold)
    assert found[0, :8].tolist() == codes and maxima.tolist() == largest
    assert (outliers is None) == (columns is None) and (columns is None or outliers[:5].tolist() == columns)
    if not threshold:
        assert (F.int8_vectorwise_dequant(found, maxima) - X).abs().max() < 0.01
        product = F.int8_mm_dequant(F.int8_linear_matmul(found, found), maxima, maxima)
        assert (product.float() - X @ X.T).abs().max() < 0.5


def test_maps():
    at = torch.tensor([0, 1, 100, 200, 254, 255])
    tables = {
        F.create_dynamic_map: [-0.992968738079071, -0.9789062738418579, -0.0074687497690320015, 0.23359374701976776,
                               0.992968738079071, 1.0],
        F.create_linear_map: [-1.0, -0.9921259880065918, -0.21259842813014984, 0.5669291615486145, 0.9921259880065918, 1.0],
        F.create_fp8_map: [-1.0, -0.8571428656578064, -2.9802322387695312e-08, 6.975446740398183e-05, 0.8571428656578064, 1.0],
    }  # fmt: skip
    for make, values in tables.items():
        assert make()[at].tolist() == pytest.approx(values, abs=1e-9), make
    unsigned = F.create_dynamic_map(False, 5, 6)[[0, 200, 230, 255]].tolist()
    assert unsigned == pytest.approx([0.0, 0.0026875000912696123, 0.3109374940395355, 1.0])
    few = F.create_dynamic_map(True, 3, 8)[[0, 1, 60, 200]].tolist()
    assert few == pytest.approx([-0.992968738079071, -0.9789062738418579, -0.3100000023841858, 0.37421876192092896])
    nf4 = sorted(set(F.create_normal_map().tolist()))
    assert nf4 == pytest.approx(sorted(F.get_4bit_type("nf4").tolist()), abs=2e-4)
    with pytest.raises(NotImplementedError, match="af4"):
        F.get_4bit_type("af4")


def test_what_makes_no_sense_is_refused():
    for call in (
        lambda: F.quantize_4bit(X, blocksize=48),
        lambda: F.quantize_4bit(X, quant_type="int3"),
        lambda: F.quantize_4bit(X.long()),
        lambda: F.quantize_blockwise(X, blocksize=0),
        lambda: F.dequantize_4bit(torch.zeros(4, dtype=torch.uint8)),
        lambda: bnb.matmul_4bit(X, torch.zeros(64, 1, dtype=torch.uint8)),
        lambda: bnb.nn.Linear4bit(64, 64, quant_type="nf5"),
    ):
        with pytest.raises(ValueError):
            call()


# Layers.


@pytest.mark.parametrize(
    ("layer", "wanted", "within"),
    [
        (
            lambda: bnb.nn.Linear4bit(128, 2, bias=False, quant_type="nf4"),
            [1.207021713256836, -0.12486541271209717],
            1e-5,
        ),
        (lambda: bnb.nn.LinearNF4(128, 2, bias=False), [1.207021713256836, -0.12486541271209717], 1e-5),
        (lambda: bnb.nn.LinearFP4(128, 2, bias=False, compress_statistics=False), [0.51485222578, -1.925759315], 1e-5),
        # bitsandbytes has no int8 activations on a CPU.
        (lambda: bnb.nn.Linear8bitLt(128, 2, bias=False, has_fp16_weights=False), [1.28863585, -0.96057999], 0.03),
        (
            lambda: bnb.nn.Linear8bitLt(128, 2, bias=False, has_fp16_weights=False, threshold=0.95),
            [1.28863585, -0.96057999],
            0.03,
        ),
    ],
)
def test_layers_have_their_numbers(layer, wanted, within):
    for quantized in (filled(layer()).to("cpu"), filled(layer()), nn.Sequential(filled(layer())).to("cpu")):
        assert quantized(INPUT)[0].tolist() == pytest.approx(wanted, abs=within)


def test_a_block_that_goes_across_rows():
    i = torch.arange(320.0)
    layer = bnb.nn.Linear4bit(40, 8, bias=False, quant_type="nf4", compress_statistics=False)
    filled(layer, (torch.sin(i * 1.3) * (1 + i % 7)).view(8, 40)).to("cpu")
    wanted = [-0.30954647064208984, 1.056325912475586, 5.322843074798584, -14.799293518066406,
              13.530684471130371, -12.023284912109375, 1.2747681140899658, -3.4588494300842285]  # fmt: skip
    assert layer(INPUT[:, :40])[0].tolist() == pytest.approx(wanted, abs=1e-4)
    assert layer.weight.blocksize == 64 and layer.state_dict()["weight.absmax"].shape == (5,)
    again = bnb.nn.Linear4bit(40, 8, bias=False, quant_type="nf4")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(INPUT[:, :40]), layer(INPUT[:, :40]))
    narrow = bnb.nn.Linear4bit(10, 83, quant_type="fp4").to("cpu")  # no dim to pack along
    dense = F.dequantize_4bit(narrow.weight.packed, narrow.quant_state)
    assert torch.equal(dense, narrow.weight.dequantize()) and narrow(INPUT[:, :10]).shape == (1, 83)


def test_when_a_weight_quantizes():
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4")
    weight = layer.weight.data.clone()
    assert isinstance(layer.weight, bnb.nn.Params4bit) and layer.quant_state is None
    layer.half().float().to(torch.bfloat16)
    assert not isinstance(layer.weight, ao.QTensor) and layer.weight.dtype == torch.bfloat16
    layer.to(torch.float32).to("meta" if False else "cpu")
    assert isinstance(layer.weight, ao.QTensor) and isinstance(layer.weight, bnb.nn.Params4bit)
    assert not layer.weight.requires_grad and layer.weight.bnb_quantized and layer.weight.quant_type == "nf4"
    dense = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense, F.dequantize_4bit(layer.weight.packed, layer.quant_state))
    assert (
        (dense - weight.bfloat16()).abs().max() < 0.02 and "NF4" not in repr(nn.Linear(2, 2)) and "nf4" in repr(layer)
    )
    param = bnb.nn.Params4bit(weight, quant_type="nf4")
    assert torch.equal(param.to("cpu").dequantize(), bnb.nn.Params4bit(weight, quant_type="nf4").cpu().dequantize())


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_layers_are_saved_as_bitsandbytes_saves_them(kind, compress):
    layer = bnb.nn.Linear4bit(128, 64, quant_type=kind, compress_statistics=compress).to("cpu")
    state = layer.state_dict()
    nested = {"weight.nested_absmax", "weight.nested_quant_map"} if compress else set()
    assert state.keys() == {"weight", "bias", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{kind}",
                            *nested}  # fmt: skip
    assert state["weight"].shape == (128 * 32, 1) and state["weight.absmax"].dtype == (
        torch.uint8 if compress else torch.float32
    )
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = bnb.nn.Linear4bit(128, 64, quant_type=kind, compress_statistics=compress)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(INPUT), layer(INPUT))
    stats = {k.removeprefix("weight."): t for k, t in state.items() if k.startswith("weight.")}
    param = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(param.dequantize(), layer.weight.dequantize())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(INPUT), layer(INPUT)) and copied.weight.quant_type == kind


def test_int8_layers_are_saved_as_bitsandbytes_saves_them():
    layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False).to("cpu")
    state = layer.state_dict()
    assert {k: t.dtype for k, t in state.items()} == {
        "weight": torch.int8, "bias": torch.float32, "SCB": torch.float32, "weight_format": torch.uint8
    }  # fmt: skip
    again = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    again.load_state_dict(state)
    assert torch.equal(again(INPUT), layer(INPUT)) and torch.equal(layer.state.CB, again.weight.CB)
    state["weight_format"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight_format"):
        again.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [
    lambda: bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16),
    lambda: bnb.nn.Linear4bit(128, 64),
    lambda: bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=0.9),
])  # fmt: skip
def test_inputs_of_any_dtype(layer, dtype):
    quantized = layer()
    plain = nn.functional.linear(INPUT, quantized.weight.data, quantized.bias.data)
    x = INPUT.detach().clone().to(dtype).requires_grad_()
    out = quantized(x)
    assert out.dtype == dtype and (out.float() - plain).abs().mean() < 0.2
    out.float().sum().backward()
    assert x.grad.abs().sum() > 0


def test_training_through_int8_products():
    """has_fp16_weights: the weight is trained, and the products are of int8."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(128, 16)
    plain = nn.Linear(128, 16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(32, 128)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert ao.compute_error(plain.weight.grad, layer.weight.grad) > 30 and layer.weight.dtype == torch.float32
    before = layer.weight
    assert layer.half().float().to("cpu").weight is before and before.requires_grad  # as an optimizer holds it
    assert ao.compute_error(plain(x), bnb.matmul(x, plain.weight, bias=plain.bias)) > 30


def test_outliers_are_multiplied_in_floating_point():
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)
    weight, x = layer.weight.data.clone(), torch.randn(8, 128)
    x[3, 7] = 200.0
    plain = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    plain.load_state_dict({"weight": weight, "bias": layer.bias.data})
    right = nn.functional.linear(x, weight, layer.bias)
    assert (
        ao.compute_error(right, layer(x)) > 35
        and ao.compute_error(right, plain(x)) < ao.compute_error(right, layer(x)) - 3
    )


def test_embeddings():
    index = torch.tensor([1])
    four = filled(bnb.nn.Embedding4bit(2, 128, quant_type="nf4")).to("cpu")
    assert four(index)[0, :4].tolist() == pytest.approx([-0.6559499502, -0.6559499502, 0.2010428160, 0.2010428160])
    eight = filled(bnb.nn.Embedding8bit(2, 128)).to("cpu")
    assert eight(index)[0, :4].tolist() == pytest.approx(
        [-0.738188982, -0.718503952, 0.216535434, 0.177165359], abs=1e-6
    )
    stable = bnb.nn.StableEmbedding(16, 64, padding_idx=0)
    assert stable(index).mean().abs() < 1e-5 and stable(index).std().item() == pytest.approx(1.0, abs=0.02)
    assert stable.weight[0].abs().sum() == 0


def test_compiled():
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(INPUT), layer(INPUT), atol=1e-5)


def test_a_product_with_codes():
    codes, state = F.quantize_4bit(X, quant_type="nf4")
    x = INPUT.clone().requires_grad_()
    out = bnb.matmul_4bit(x, codes, quant_state=state, bias=torch.ones(2))
    assert out[0].tolist() == pytest.approx((INPUT @ F.dequantize_4bit(codes, state).T + 1)[0].tolist())
    out.sum().backward()
    assert x.grad.shape == INPUT.shape


# Optimizers.


@pytest.mark.parametrize(
    ("name", "kwargs", "wanted"),
    [
        ("AdamW8bit", {}, [0.9836715459823608, 0.9770179390907288, 0.5114905834197998, 0.9826019406318665]),
        ("PagedAdamW8bit", {}, [0.9836715459823608, 0.9770179390907288, 0.5114905834197998, 0.9826019406318665]),
        (
            "Adam8bit",
            {"weight_decay": 0.1},
            [0.9809812903404236, 0.9743472933769226, 0.5100597739219666, 0.9799745678901672],
        ),
        (
            "Lion8bit",
            {"weight_decay": 0.1},
            [0.9770130515098572, 0.9869831800460815, 0.5087130665779114, 0.9720441102981567],
        ),
        (
            "SGD8bit",
            {"momentum": 0.9},
            [0.9997506141662598, 0.9993516206741333, 0.5399550199508667, 0.9651573896408081],
        ),
        ("AdamW", {}, [0.9836638569831848, 0.9770560264587402, 0.5113789439201355, 0.9831419587135315]),
        ("RMSprop", {}, [0.8264369, 0.9045833, 0.2893521, 1.0177337]),
        ("Adagrad", {}, [0.9826605, 0.9903972, 0.5152336, 0.9702726]),
        ("Adagrad8bit", {}, [0.9825421, 0.9904519, 0.5152507, 0.9702998]),
        ("LARS", {"momentum": 0.9, "max_unorm": 0.001}, [0.9999958, 0.9999372, 0.540296, 0.9649707]),
        (
            "PytorchLARS",
            {"momentum": 0.9, "weight_decay": 0.1, "max_unorm": 0.001},
            [0.9999701, 0.9999175, 0.5402851, 0.9649397],
        ),
        ("AdEMAMix", {}, [0.9836445, 0.9770353, 0.5113509, 0.9831573]),
        ("PagedAdEMAMix8bit", {"t_alpha": 5, "t_beta3": 5}, [0.9836493, 0.9769751, 0.5114525, 0.9826378]),
    ],
)
def test_three_steps(name, kwargs, wanted):
    i = torch.arange(8192.0)
    p = nn.Parameter(torch.cos(i * 0.01))
    optimizer = getattr(bnb.optim, name)([p], lr=1e-2, compile=False, **kwargs)
    for k in range(3):
        p.grad = torch.sin(i * 1.7 + k) * (1 + i % 5) / 100
        optimizer.step()
    assert p.detach()[[0, 1, 100, 5000]].tolist() == pytest.approx(wanted, abs=2e-4)
    quantized = isinstance(next(t for k, t in optimizer.state[p].items() if k != "step"), ao.QTensor)
    assert quantized == name.endswith("8bit")


def states(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> bool:
    p.grad = torch.ones_like(p)
    optimizer.step()
    return any(isinstance(t, ao.QTensor) for t in optimizer.state[p].values())


def test_which_states_are_small():
    p = nn.Parameter(torch.randn(64, 128))
    assert states(bnb.optim.Adam([p], optim_bits=8, compile=False), p) and not states(
        bnb.optim.Adam([p], compile=False), p
    )
    assert not states(bnb.optim.AdamW8bit([p], min_8bit_size=16384, compile=False), p)
    embedding = bnb.nn.StableEmbedding(64, 128)
    assert not states(bnb.optim.Adam8bit(embedding.parameters(), compile=False), embedding.weight)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(p, "optim_bits", 32)
    assert not states(bnb.optim.Adam8bit([p], compile=False), p)
    manager.override_config(p, key_value_dict={"optim_bits": 8})
    assert states(bnb.optim.Adam8bit([p], compile=False), p)


def test_what_optimizers_refuse():
    p = [nn.Parameter(torch.zeros(8))]
    for kwargs in ({"percentile_clipping": 0}, {"block_wise": False}, {"optim_bits": 16}):
        with pytest.raises((NotImplementedError, ValueError), match=next(iter(kwargs))):
            bnb.optim.Adam(p, **kwargs)
    with pytest.raises(TypeError, match="momentum"):
        bnb.optim.Adam8bit(p, momentum=0.9)
    bnb.optim.Adam8bit(p, 1e-3, (0.9, 0.999), 1e-8, 0, False, 32, None, 4096, percentile_clipping=100, is_paged=True)
    for cls, kwargs in [(bnb.optim.RMSprop, {"centered": True}), (bnb.optim.LARS8bit, {"lr": 1.0, "momentum": 0.0})]:
        with pytest.raises(NotImplementedError, match=cls.__name__):
            cls(p, **kwargs)
