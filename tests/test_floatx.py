"""`FloatX` against values of the formats' own implementations, and what is special about its blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import weight
from torch.nn import functional as F

import ao
from ao.dtypes import E8M0, FP6, MXFP4, MXFP6, MXFP8, MXINT8, NVFP4, FloatX, MXInt, unpack

ELEMENTS = {"fp4": (2, 1), "e4m3": (4, 3), "e5m2": (5, 2), "e3m2": (3, 2), "e2m3": (2, 3)}
AMAX = (0.0, 1.0, 6.0, 7.0, 7.99, 448.0, 449.0, 1e-40, 3e38, math.nan)
SCALES = [
    ("fp4", "floor", "007d7f7f7f858500fcff"),
    ("fp4", "ceil", "007d808080868600fdff"),
    ("fp4", "rceil", "007d7f8080868600fdff"),
    ("fp4", "even", "007d7f8080868600fdff"),
    ("e4m3", "floor", "00777979797f7f00f6ff"),
    ("e4m3", "ceil", "00777a7a7a808000f7ff"),
    ("e4m3", "rceil", "007779797a7f8000f7ff"),
    ("e4m3", "even", "007779797a7f7f00f6ff"),
    ("e5m2", "floor", "0070727272787800efff"),
    ("e5m2", "ceil", "0070737373797900f0ff"),
    ("e5m2", "rceil", "0070727273787900f0ff"),
    ("e5m2", "even", "0070727273787800efff"),
    ("e3m2", "floor", "007b7d7d7d838300faff"),
    ("e3m2", "ceil", "007b7e7e7e848400fbff"),
    ("e3m2", "rceil", "007b7d7d7e838400fbff"),
    ("e3m2", "even", "007b7d7d7e838300faff"),
    ("e2m3", "floor", "007d7f7f7f858500fcff"),
    ("e2m3", "ceil", "007d808080868600fdff"),
    ("e2m3", "rceil", "007d7f7f80858500fcff"),
    ("e2m3", "even", "007d7f7f80858500fcff"),
]
"""Bytes of the shared exponents of blocks whose largest magnitudes are `AMAX`, of torchao's `to_mx`."""


def octets(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def codes(q) -> torch.Tensor:
    return unpack(q.qdata, q.spec.bits)


@pytest.mark.parametrize(("element", "rule", "expected"), SCALES)
def test_shared_exponents(element, rule, expected):
    x = torch.zeros(len(AMAX), 32)
    x[:, 5] = -torch.tensor(AMAX)
    q = FloatX(*ELEMENTS[element], scale_rule=rule).quantize(x)
    assert torch.equal(q.scale.qdata.flatten(), octets(expected))
    values = q.dequantize()
    assert values[-1].isnan().all() and values[0].eq(0).all() and values[:-2].isfinite().all()


@pytest.mark.parametrize(
    ("exponent", "mantissa", "expected"),
    [
        (3, 2, "0020000102030c0c0e181f1f1f1f35"),
        (2, 3, "00200001010208090b1f1f1f1f1f3a"),
        (2, 2, "0010000000010404060f0f0f0f0f1d"),
        (3, 1, "0010000101020606070c0f0f0f0f1b"),
    ],
)
def test_codes(exponent, mantissa, expected):
    """Those of torchao's fpx; halves go to even, and what is too large saturates."""
    x = torch.tensor(
        [[0.0, -0.0, 0.03, 0.0626, 0.1, 0.19, 1.0, 1.125, 1.375, 7.6, 27.9, 28.0, 30.0, 1e22, -5.1]],
        dtype=torch.float32,
    )
    spec = FloatX(exponent, mantissa, (1, -1), "float32")
    q = spec.quantize(F.pad(x, (0, 1)), scale=torch.ones(1, 1))
    assert torch.equal(codes(q)[0, :15], octets(expected))


@pytest.mark.parametrize(
    "spec", [MXFP4, MXFP6, FloatX(3, 2), FloatX(2, 2), FloatX(3, 1), FloatX(3, 3), MXFP8, FloatX(5, 2)]
)
def test_every_code(spec):
    """A code stands for sign * 2**(E - bias) * 1.M, or below that 2**(1 - bias) * 0.M, and is what its value is rounded to."""
    every = torch.arange(2**spec.bits, dtype=torch.uint8)
    sign = 1 - 2 * (every >> (spec.bits - 1)).double()
    exponent = ((every >> spec.mantissa) & (2**spec.exponent - 1)).double()
    fraction = (every & (2**spec.mantissa - 1)).double() / 2**spec.mantissa
    normal = 2 ** (exponent - spec.bias) * (1 + fraction)
    values = sign * torch.where(exponent > 0, normal, 2.0 ** (1 - spec.bias) * fraction)
    assert torch.equal(spec.values(every).double(), values)
    some = values[values.abs() <= spec.max].float()[None]
    wide = replace(spec, block=(1, -1), scale="float32")
    back = wide.round(some, scale=torch.ones(1, 1))
    assert torch.equal(back, some) and torch.equal(back.signbit(), some.signbit())
    assert float(some.max()) == spec.max
    middles = (some[0].unique()[1:] + some[0].unique()[:-1])[None] / 2
    assert (codes(wide.quantize(F.pad(middles, (0, -middles.shape[1] % 8)), scale=torch.ones(1, 1))) % 2 == 0).all()


W = [
    [1.5, -0.75, 0.25, 6.0, -3.0, 0.1, -0.05, 2.4, 0.0, 5.2, -5.1, 1.1, 0.6, -0.9, 3.4, -2.6],
    [0.02, 0.01, -0.015, 0.03, 0.001, -0.002, 0.004, 0.008, -0.016, 0.027, 0.011, 0.0, 0.005, -0.029, 0.013, 0.022],
]


def test_nvfp4_in_two_levels():
    """scale = e4m3(amax / 6 / s), s = amax of the tensor / (6 * 448); codes of x / (scale * s)."""
    x = torch.tensor(W)
    q = NVFP4.quantize(x)
    assert q.scale.scale.item() == pytest.approx(6.0 / (6 * 448), rel=1e-6)
    assert q.scale.qdata.float().flatten().tolist() == [448.0, 2.25]
    expected = torch.tensor(
        [
            [q.spec.round(r[None], scale=s[None, None]).flatten().tolist()]
            for r, s in zip(x, q.scale.dequantize().flatten())
        ]
    )
    assert torch.equal(q.dequantize(), expected.reshape(2, 16))


def test_one_level_saturates_at_its_scale():
    spec = replace(NVFP4, scale="e4m3", scale_spec=None)
    q = spec.quantize(torch.full((1, 16), 1e4))
    assert q.scale.dtype == torch.float8_e4m3fn and q.dequantize().eq(6 * 448).all()


def test_accuracy():
    """SQNR of normal weights in dB: a change of numerics is a change of these numbers."""
    w = weight((1024, 1024))
    found = {
        "MXFP4": MXFP4,
        "even": FloatX(scale_rule="even"),
        "NVFP4": NVFP4,
        "four over six": replace(NVFP4, four_over_six=True),
        "MXFP6": MXFP6,
        "e3m2": FloatX(3, 2),
        "FP6": FP6,
        "MXFP8": MXFP8,
        "MXINT8": MXINT8,
    }
    assert {name: round(float(ao.compute_error(w, s.quantize(w).dequantize())), 1) for name, s in found.items()} == {
        "MXFP4": 18.8,
        "even": 19.0,
        "NVFP4": 20.4,
        "four over six": 21.2,
        "MXFP6": 30.9,
        "e3m2": 25.4,
        "FP6": 25.6,
        "MXFP8": 30.6,
        "MXINT8": 41.7,
    }


def test_bits():
    """Six bits cost six: the bytes of the fields."""
    for spec, bits in (
        (MXFP4, 4.25),
        (MXFP6, 6.25),
        (MXFP8, 8.25),
        (MXINT8, 8.25),
        (FP6, 6 + 32 / 1024),
    ):
        q = spec.quantize(weight((1024, 1024)))
        assert 8 * q.nbytes / q.numel() == pytest.approx(bits)
    assert 8 * NVFP4.quantize(weight((1024, 1024))).nbytes / 2**20 == pytest.approx(4.5 + 32 / 2**20)


def test_powers_of_two():
    x = torch.tensor([0.0, 1.0, 1.4, 1.5, -2.0, 3.4e38, math.inf, math.nan, 2.0**-127, 1e-45])
    q = E8M0().quantize(x)
    assert q.qdata.tolist()[:4] == [0, 127, 127, 128] and q.qdata[5:8].tolist() == [254, 255, 255]
    assert q.dequantize()[8] == 2.0**-127 and q.dequantize()[6:8].isnan().all()


def test_integers_in_blocks():
    """OCP: x = q / 64 * 2**(byte - 127), with byte - 127 = floor(log2 max|x|); the lowest code is left out."""
    x = weight((16, 64)) * 2.0 ** torch.arange(-140, 116, 16)[:, None]
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    x[1, 32:] = 0
    blocks = x.double().reshape(16, 2, 32)
    exponent = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-127).log2().floor()
    step = 2.0 ** (exponent - 6)
    expected = (blocks / step).round().clamp(-127, 127) * step
    q = MXINT8.quantize(x)
    assert torch.equal(q.scale.qdata, (exponent + 127).squeeze(-1).to(torch.uint8))
    assert torch.equal(q.dequantize().double().reshape(blocks.shape), expected)
    x[3, 40], x[4, 0] = math.nan, math.inf
    values = MXINT8.quantize(x).dequantize()
    assert values[3, 32:].isnan().all() and values[4, :32].isnan().all() and values[3, :32].isfinite().all()


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
def test_rules_of_integers(rule):
    """Powers of two for the largest numbers 1, 127 / 64 and just above it, and 1 + 63.5 / 64, which 7 bits round up."""
    x = torch.zeros(4, 32)
    x[:, 7] = torch.tensor([1.0, 127 / 64, 127.25 / 64, 127.5 / 64])
    found = MXInt(scale_rule=rule).quantize(x).scale.qdata.flatten().tolist()
    assert (
        found
        == {
            "floor": [127, 127, 127, 127],
            "ceil": [127, 128, 128, 128],
            "rceil": [127, 127, 128, 128],
            "even": [127, 127, 127, 128],
        }[rule]
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ao.FPXWeightOnlyConfig(3, 2), FP6),
        (ao.MXFPWeightOnlyConfig(scale_rule="floor"), MXFP4),
        (ao.MXFPWeightOnlyConfig(torch.float8_e4m3fn, scale_rule="floor"), MXFP8),
        (ao.MXFPWeightOnlyConfig(torch.float4_e2m1fn_x2, scale_rule="floor"), MXFP4),
        (ao.MXDynamicActivationMXWeightConfig(), FloatX(4, 3, scale_rule="rceil")),
        (ao.MXFPWeightOnlyConfig(torch.int8, scale_rule="floor"), MXINT8),
        (ao.MXDynamicActivationMXWeightConfig("int8", activation_dtype="int8"), MXInt(scale_rule="rceil")),
        (ao.NVFP4WeightOnlyConfig(), NVFP4),
        (ao.NVFP4DynamicActivationNVFP4WeightConfig(four_over_six=True), replace(NVFP4, four_over_six=True)),
    ],
)
def test_configs(config, expected):
    assert config.weight((64, 64)) == expected
    assert ao.Config.from_dict(config.to_dict()) == config
    model = torch.nn.Linear(64, 64, bias=False)
    before = model.weight.detach().clone()
    ao.quantize_(model, config)
    x = torch.randn(3, 64)
    act = config.act()
    seen = x if act is None else act.quantize(x).dequantize()
    out = F.linear(seen, expected.quantize(before).dequantize())
    if act is not None and getattr(expected, "scale_spec", None) is not None:  # scales of the tensors multiply the sum
        assert ao.compute_error(out, model(x)) > 120
    else:
        assert torch.equal(model(x), out)


def test_refused():
    for make in (
        lambda: FloatX(1, 2),
        lambda: FloatX(5, 3),
        lambda: FloatX(scale="e5m2"),
        lambda: FloatX(scale_rule="down"),
        lambda: FloatX(scale_spec=E8M0()),
        lambda: FloatX(four_over_six=True),
        lambda: ao.FPXWeightOnlyConfig(6, 2),
        lambda: ao.MXFPWeightOnlyConfig("e9m9"),
        lambda: ao.MXDynamicActivationMXWeightConfig(activation_dtype=torch.int4),
        lambda: MXInt(scale_rule="down"),
    ):
        with pytest.raises(ValueError, match="must be|is for|quantizes float32"):
            make()


def test_algorithms_take_it():
    """GPTQ and HQQ know Specs only."""
    torch.manual_seed(0)
    w, x = weight((64, 128)), torch.randn(512, 24) @ torch.randn(24, 128) + 0.3 * torch.randn(512, 128)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))

    def error(algorithm, spec):
        with torch.no_grad():
            model[0].weight = torch.nn.Parameter(w.clone())
        data = [x] if algorithm == "gptq" else None
        ao.quantize_(model, ao.SpecConfig(spec, algorithm=algorithm), calibration_data=data)
        return float((F.linear(x, w) - model(x)).norm())

    for spec in (MXFP4, NVFP4):
        assert error("gptq", spec) < 0.85 * error("rtn", spec)
    assert error("hqq", NVFP4) < 1.02 * error("rtn", NVFP4)


@pytest.mark.parametrize("spec", [MXFP4, MXFP8, FloatX(3, 2, (1, -1), "float32")])
def test_stochastic_rounding(spec):
    """A number becomes one of its two neighbours, and their mean over many copies is the number, below the normal ones too."""
    spec = replace(spec, scale_rule="rceil", rounding="stochastic")
    x = torch.linspace(-1, 1, 64).repeat(512, 1)
    x[:, ::2] *= 2.0**-6
    x += 1e-6 * weight(x.shape)  # every copy rounds by itself
    x[:, 0] = 1.0
    q = spec.quantize(x)
    values = q.dequantize()
    assert torch.equal(values, spec.round(x, scale=q.scale))
    scale = q.scale.dequantize() if spec.scale == "e8m0" else q.scale
    steps = spec.values(torch.arange(2**spec.bits, dtype=torch.uint8)).sort().values.unique()
    steps = steps[steps.abs() <= spec.max]
    u = (x.reshape(512, scale.shape[1], -1) / scale.unsqueeze(-1)).reshape(x.shape)
    above = torch.searchsorted(steps, u.contiguous()).clamp(1, len(steps) - 1)
    near = torch.stack([steps[above - 1], steps[above]])
    found = (values.reshape(512, scale.shape[1], -1) / scale.unsqueeze(-1)).reshape(x.shape)
    assert (torch.isclose(found, near[0]) | torch.isclose(found, near[1])).all()
    gap = (near[1] - near[0]) * scale.amax()
    assert ((values.mean(0) - x.mean(0)).abs() < 5 * gap.amax(0) / 2 / 512**0.5).all()
    with pytest.raises(ValueError, match="rounding must be"):
        FloatX(rounding="up")
