"""What people read when something is printed or goes wrong, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable

import expecttest
import torch
import torch.nn.functional as F
from cases import weight
from torch import nn

from ao.dtypes import NF4, Codebook, Float8, Int4Prepacked, Intx, Spec, to_nf4
from ao.quant import (
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    NF4WeightOnlyConfig,
    autoquant,
    dequantize_,
    quantize_,
)


def message(fn: Callable[[], object]) -> str:
    try:
        fn()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


class Messages(expecttest.TestCase):
    def test_reprs(self) -> None:
        w = weight((64, 256), dtype=torch.bfloat16)
        specs: list[Spec] = [Intx(8), Intx(4, (1, 32)), Float8("e5m2", (-1, -1)), NF4, Intx(8, act=Intx(8))]
        self.assertExpectedInline(
            "\n".join(repr(spec.quantize(w)) for spec in specs),
            """\
IntxTensor(Intx(bits=8), shape=(64, 256), torch.bfloat16, cpu, 8.12 bits per element)
IntxTensor(Intx(bits=4, block=(1, 32)), shape=(64, 256), torch.bfloat16, cpu, 5.25 bits per element)
Float8Tensor(Float8(format='e5m2', block=(-1, -1)), shape=(64, 256), torch.bfloat16, cpu, 8.00 bits per element)
CodebookTensor(NF4, shape=(64, 256), torch.bfloat16, cpu, 4.41 bits per element)
IntxTensor(Intx(bits=8, act=Intx(bits=8)), shape=(64, 256), torch.bfloat16, cpu, 8.12 bits per element)""",
        )
        trained = nn.Parameter(Intx(8).quantize(w))
        self.assertExpectedInline(
            repr(trained),
            """IntxTensor(Intx(bits=8), shape=(64, 256), torch.bfloat16, cpu, 8.12 bits per element, requires_grad=True)""",
        )

    def test_specs(self) -> None:
        tries: list[Callable[[], object]] = [
            lambda: Intx(9),
            lambda: Intx(4, zero_point="maybe"),  # type: ignore[arg-type]
            lambda: Intx(1, narrow=True),
            lambda: Float8("e3m4"),  # type: ignore[arg-type]
            lambda: Codebook("nf5"),
            lambda: Codebook((0.0, 0.5, 1.0)),
            lambda: Codebook((1.0, 0.0)),
            lambda: Int4Prepacked("tpu"),  # type: ignore[arg-type]
            lambda: Spec.from_dict({"type": "Posit", "bits": 8}),
            lambda: Spec.from_dict({"type": "Intx", "bitz": 8}),
        ]
        # Other tests define Specs of their own.
        known = re.sub(r"(?<=knows ).*", "[...]", "\n".join(message(t) for t in tries))
        self.assertExpectedInline(
            known,
            """\
ValueError: Intx: bits must be 1 to 8, got 9
ValueError: Intx: zero_point must be 'int', 'float' or 'joint', got 'maybe'
ValueError: Intx: narrow=True needs signed=True, symmetric=True and at least 2 bits
ValueError: Float8: format must be 'e4m3' or 'e5m2', got 'e3m4'
ValueError: Codebook: table must be one of ['dynamic', 'fp4', 'nf4'] or a tuple of values, got 'nf5'
ValueError: Codebook: table must have 2, 4, 8, ... or 256 values, got 3
ValueError: Codebook: the values of table must be sorted
ValueError: Int4Prepacked: kernel must be 'cuda' or 'cpu', got 'tpu'
ValueError: unknown Spec type 'Posit'; this version of ao knows [...]
ValueError: Intx has no field ['bitz']; a newer version of ao may have written this""",
        )

    def test_shapes(self) -> None:
        w = weight((64, 256))
        q = Intx(4, (1, 32)).quantize(w)
        tries: list[Callable[[], object]] = [
            lambda: Intx(4, (1, 96)).quantize(w),
            lambda: Intx(4, (1, 0)).quantize(w),
            lambda: Intx(4, (32, 32)).quantize(w[0]),
            lambda: Intx(4).quantize(weight((3, 9))),
            lambda: to_nf4(weight((4, 96))),
            lambda: Int4Prepacked("cpu").quantize(weight((15, 128))),
            lambda: Intx(8).quantize(torch.arange(8)),
            lambda: Intx(8).quantize(q),
            lambda: q[:, 16:],
            lambda: Intx(8, (32, 32)).quantize(w)[5:40],
            lambda: q.view(128, 2, 64).view(-1, 3),
            lambda: q.t().view(-1),
            lambda: torch.cat([q, Intx(8).quantize(w)]),
            lambda: q + 1,
            lambda: torch.cat([q, w]),
            lambda: Int4Prepacked("cpu", (1, 32)).quantize(w)[:16],
            lambda: Int4Prepacked("cuda", (1, 128)).quantize(w),
            lambda: Intx(8, (-1, -1)).quantize(w)[:8].zero_(),
            lambda: q.to(torch.int8),
            lambda: F.linear(weight((2, 100)), q),
        ]
        self.assertExpectedInline(
            "\n".join(message(t) for t in tries),
            """\
ValueError: Intx(bits=4, block=(1, 96)): dim 1 of shape (64, 256) is not a multiple of its block 96; use block=(1, 32), -1 for the whole dim, or leave this tensor out
ValueError: Intx(bits=4, block=(1, 0)): block=(1, 0): a block is a positive size, or -1 for the whole dim
ValueError: Intx(bits=4, block=(32, 32)): block=(32, 32) has more dims than the data's shape (256,)
ValueError: Intx(bits=4): no dim of shape (3, 9) is a multiple of 8, so nothing can be packed; use 8 bits
ValueError: Codebook(table='nf4'): dim 1 of shape (4, 96) is not a multiple of its block 64; use block=(1, 32), -1 for the whole dim, or leave this tensor out
ValueError: Int4Prepacked(kernel='cpu') needs a 2-D weight with dim 0 a multiple of 16 and dim 1 of 128, got shape (15, 128); use Intx(bits=4, block=(1, 128)), which takes any
TypeError: Intx(bits=8).quantize takes a floating-point tensor, got torch.int64; convert it first
TypeError: Intx(bits=8).quantize: the tensor is quantized already (Intx(bits=4, block=(1, 32))); call .dequantize() first
ValueError: cannot take [16:256) of dim 1 of this IntxTensor of shape (64, 256): the dim is packed in chunks of 32; cut at multiples of 32, or call .dequantize() first
ValueError: cannot take [5:40) of dim 0 of this IntxTensor of shape (64, 256): the dim is quantized in blocks of 32; cut at multiples of 32, or call .dequantize() first
ValueError: cannot view a tensor of shape (128, 2, 64) as (5461, 3)
ValueError: cannot view this IntxTensor of shape (256, 64) as (16384,): it is packed in chunks of 32; call .dequantize() first
NotImplementedError: cannot cat IntxTensor(Intx(bits=4, block=(1, 32)), shape=(64, 256), torch.float32, cpu, 5.25 bits per element) with IntxTensor(Intx(bits=8), shape=(64, 256), torch.float32, cpu, 8.12 bits per element): all must be quantized by the same Spec; call .dequantize() on each first, or leave a layer whose weight the model joins to another out of quantize_, by filter_fn
NotImplementedError: aten.add.Tensor has no low-bit form for IntxTensor: call .dequantize() first and .quantize() the result, or use an in-place op, which quantizes anew
NotImplementedError: cannot cat IntxTensor(Intx(bits=4, block=(1, 32)), shape=(64, 256), torch.float32, cpu, 5.25 bits per element) with Tensor: all must be quantized by the same Spec; call .dequantize() on each first, or leave a layer whose weight the model joins to another out of quantize_, by filter_fn
NotImplementedError: Int4PrepackedTensor.qdata is in a device-specific layout that cannot be cut or reordered; do this before quantizing, or quantize with the default layout
TypeError: Int4Prepacked(kernel='cuda') lays out weights for cuda, and this one is on cpu; move it there first, pass device= to quantize_, or use the default layout, which serves every device
ValueError: this IntxTensor of shape (8, 256) is a view that shares the scales of its blocks with elements outside of it, so it cannot be quantized anew in place; write to the whole tensor, or .clone() the view
TypeError: this IntxTensor dequantizes to a floating-point dtype, not to torch.int8
ValueError: linear: the input of shape (2, 100) does not fit the weight of shape (64, 256); the last dim of the input must be the weight's second""",
        )

    def test_products(self) -> None:
        q = Intx(8, act=Intx(8)).quantize(weight((64, 256)))
        tries: list[Callable[[], object]] = [
            lambda: Float8().quantize(torch.full((2, 2), 1e300, dtype=torch.float64)),
            lambda: torch.einsum("mk,nk->mn", weight((2, 256)), q),
            lambda: F.linear(torch.ones(2, 256, dtype=torch.int64), q),
            lambda: torch.mm(weight((2, 256)), q.t(), out=torch.empty(2, 64, dtype=torch.float16)),
        ]
        self.assertExpectedInline(
            "\n".join(message(t) for t in tries),
            """\
ValueError: Float8(format='e4m3').quantize computes in float32, and the data has numbers up to 1e+300, which are beyond its range; scale them down first
NotImplementedError: einsum: Intx(bits=8, act=Intx(bits=8)) quantizes activations, which only a linear layer and products of two matrices do; use a format that quantizes weights alone, or do not quantize this layer
TypeError: linear: the input must be floating point, got torch.int64; convert it first
RuntimeError: out is torch.float16, and the result torch.float32; give an out of that dtype""",
        )

    def test_models(self) -> None:
        model = nn.ModuleDict({"gate": nn.Linear(100, 64), "up": nn.Linear(64, 64)})
        tries: list[Callable[[], object]] = [
            lambda: quantize_(model, Int4WeightOnlyConfig()),
            lambda: quantize_(model, NF4WeightOnlyConfig()),
            lambda: quantize_(model, "mxfp4"),
            lambda: quantize_(model, Intx(3, (1, 32))),
            lambda: quantize_(nn.Linear(9, 3), "fp6"),
            lambda: quantize_(torch.zeros(4, 4), "int8"),  # type: ignore[arg-type]
            lambda: quantize_(model, "int8", "gate"),  # type: ignore[arg-type]
            lambda: Int8WeightOnlyConfig(group_size=0),
            lambda: NF4WeightOnlyConfig(block_size="64"),  # type: ignore[arg-type]
            lambda: quantize_(model, FqnToConfig({"gates": Intx(8)})),
            lambda: quantize_(model, Int4WeightOnlyConfig),  # type: ignore[arg-type]
            lambda: Int4WeightOnlyConfig(layout="plain"),  # type: ignore[arg-type]
            lambda: quantize_(model, "int8", filter_fn=lambda *_: False),
            lambda: quantize_(nn.LayerNorm(4), "int8", filter_fn=lambda *_: False),
            lambda: quantize_(model["up"], "int4-g32+gptq", calibration_data=[torch.zeros(2, 64), torch.zeros(2, 60)]),
            lambda: quantize_(model["up"], "int4-g32+gptq", calibration_data=[{"x": torch.zeros(2, 64)}]),
            lambda: autoquant(model, min_sqnr="a"),  # type: ignore[arg-type]
            lambda: quantize_(model, "int8", lambda module: True),  # type: ignore[arg-type,misc]
            lambda: dequantize_(model, filter_fn="gate"),  # type: ignore[arg-type]
            lambda: quantize_(model, {"gate": "int8"}),  # type: ignore[arg-type]
            lambda: quantize_(torch.jit.ScriptModule(), "int8"),
            lambda: FqnToConfig({"re:(": "int8"}),
        ]
        self.assertExpectedInline(
            "\n".join(message(t) for t in tries),
            """\
ValueError: gate.weight: Intx(bits=4, block=(1, 128), signed=False): dim 1 of shape (64, 100) is not a multiple of its block 128; use group_size=4, give unsupported='skip', or leave it out with filter_fn (--skip)
ValueError: gate.weight: Codebook(table='nf4'): dim 1 of shape (64, 100) is not a multiple of its block 64; use blocks of 4, give unsupported='skip', or leave it out with filter_fn (--skip)
ValueError: gate.weight: MXFP4: dim 1 of shape (64, 100) is not a multiple of its block 32; give SpecConfig(MXFP4, unsupported='skip'), or leave it out with filter_fn (--skip)
ValueError: gate.weight: Intx(bits=3, block=(1, 32)): dim 1 of shape (64, 100) is not a multiple of its block 32; use block=(1, 4), give SpecConfig(Intx(bits=3, block=(1, 32)), unsupported='skip'), or leave it out with filter_fn (--skip)
ValueError: weight: FP6: no dim of shape (3, 9) is a multiple of 8, so nothing can be packed; use 8 bits, give SpecConfig(FP6, unsupported='skip'), or leave it out with filter_fn (--skip)
TypeError: quantize_ takes a model, an nn.Module, got Tensor; a tensor is for Spec.quantize
TypeError: quantize_: filter_fn must be a function (module, name) -> bool, got 'gate'; FqnToConfig({name: config, ...}) takes names
ValueError: Int8WeightOnlyConfig: group_size must be a number such as 128, or -1 for the whole row, got 0
ValueError: NF4WeightOnlyConfig: block_size must be a number such as 128, or -1 for the whole row, got '64'
ValueError: FqnToConfig: the rule 'gates' matches no layer; the nearest names are gate, gate.weight
TypeError: quantize_ takes a config such as Int4WeightOnlyConfig() or a Spec such as Intx(bits=4), got <class 'ao.quant.presets.Int4WeightOnlyConfig'>; call it first
ValueError: Int4WeightOnlyConfig: layout must be one of Layout, got 'plain'
ValueError: filter_fn takes no layer with a weight; it is asked for each layer as filter_fn(module, name), and the linear ones are 'gate', 'up'
ValueError: filter_fn takes no layer with a weight; the model has no linear layer
ValueError: calibration_data: batch 1, a tensor of shape (2, 60) and torch.float32, gives weight inputs of 60 features, and it takes 64; give batches as the model takes them
ValueError: calibration_data: batch 0, a dict of {x: (2, 64)}, does not run through the model: Linear.forward() got an unexpected keyword argument 'x'; a batch is what one call of the model takes: a tensor, a tuple of arguments, or a dict of keyword arguments
TypeError: autoquant: min_sqnr must be a number of decibels, such as 30.0, or None, got 'a'
TypeError: quantize_: filter_fn must be a function (module, name) -> bool, got one of (module); FqnToConfig({name: config, ...}) takes names
TypeError: dequantize_: filter_fn must be a function (module, name) -> bool, got 'gate'; FqnToConfig({name: config, ...}) takes names
TypeError: quantize_ takes a config such as Int4WeightOnlyConfig() or a Spec such as Intx(bits=4), got {'gate': 'int8'}; FqnToConfig(rules) takes a dict of name -> config
TypeError: quantize_: the model is a program of torch.jit, which is fixed; quantize the model, then trace it
ValueError: FqnToConfig: the rule 're:(' is no regular expression: missing ), unterminated subpattern at position 0""",
        )
