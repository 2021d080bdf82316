"""ONNX: what a quantized model becomes, run by onnxruntime."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ao
from ao.dtypes import (
    FP6,
    MXFP4,
    MXFP6,
    MXFP8,
    MXINT8,
    NF4,
    NVFP4,
    BlockSparse,
    Codebook,
    DynamicTree,
    Float8,
    FloatX,
    Intx,
    PositiveSteps,
    Shifted,
    Sparse24,
    Spec,
    Ternary,
)

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from ao.integrations.onnx import export  # noqa: E402  after what it needs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),  # torch.export, of its own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx"),
]

K = 128
UINT4, INT4, INT8, FLOAT8 = 21, 22, 3, 17
SIX_BITS = Intx(6, (1, 4), signed=False, symmetric=True, scale_dtype="float16")
"""Of GGUF's Q4_K."""

WEIGHT_ONLY = [
    Intx(8),
    Intx(8, (1, 32)),
    Intx(8, (-1, -1), signed=False, symmetric=False),
    Intx(4, (1, 32)),
    Intx(4, (1, 32), signed=False),
    Intx(4, (1, -1), symmetric=True),
    Intx(4, (1, 64), zero_point="float", scale_dtype="bfloat16"),
    Intx(6, (32, 32)),
    Intx(3, (1, 64)),
    Intx(1, (1, 32), symmetric=True),
    Float8(),
    Float8("e5m2", (32, 64)),
    NF4,
    Codebook(tuple((i - 127.5) / 127.5 for i in range(256)), (1, -1)),
    MXFP4,
    MXFP8,
    NVFP4,
    FP6,
    FloatX(3, 2, (1, 64), "float16"),
    DynamicTree(8, block=(1, 64)),
    MXINT8,
    Shifted(4, (1, 32), scale_dtype="float16"),
    Shifted(4, (1, 32), scale_spec=SIX_BITS, shift_spec=SIX_BITS),
    PositiveSteps(4, (1, 32)),
    Ternary(),
    Ternary((1, 64), "bits", "bfloat16"),
    Sparse24(prune=True),
    Sparse24(Intx(4, (1, 64), symmetric=True), prune=True),
]
ACTIVATIONS = [
    Intx(8, act=Intx(8)),
    Intx(8, act=Intx(8, symmetric=False)),
    Intx(4, (1, 32), symmetric=True, act=Intx(8, symmetric=False)),
    Float8(act=Float8()),
    Float8(act=Float8(power_of_two=True)),
    Intx(8, act=Intx(8, scale_dtype="bfloat16")),
    replace(NVFP4, act=NVFP4),
    replace(MXFP4, act=MXFP8),
    replace(MXFP8, act=MXFP8),
    replace(MXFP6, act=MXFP6),
    replace(MXINT8, act=MXINT8),
    Ternary(act=Intx(8, narrow=True)),
    Sparse24(Intx(8), prune=True, act=Intx(8)),
]


class Side(nn.Module):
    """Layers side by side over one input, each of a format of its own."""

    def __init__(self, specs: list[Spec]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(K, 192, bias=i % 2 == 0) for i in range(len(specs)))
        for layer, spec in zip(self.layers, specs):
            ao.quantize_(layer, spec)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def run(program: torch.onnx.ONNXProgram, *inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)})
    return torch.from_numpy(out)


def same(program: torch.onnx.ONNXProgram, model: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """Like the eager model for inputs of several sizes, one with a row of zeros."""
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    for size in sizes:
        x = torch.randn(*size, K)
        x[0, 0] = 0
        with torch.no_grad():
            torch.testing.assert_close(run(program, x), model(x), rtol=1e-4, atol=1e-4)


def weights(program: torch.onnx.ONNXProgram) -> list[tuple[int, int]]:
    """The type and the elements of every initializer that is large."""
    found = [(t.data_type, torch.Size(t.dims).numel()) for t in program.model_proto.graph.initializer]
    return [(kind, n) for kind, n in found if n >= K * 192 / 2]


DYNAMIC = ({0: "batch", 1: "tokens"},)


def test_standard_operators():
    """`torch.onnx.export` takes every kind of weight and activation."""
    operators = standard(
        [Intx(8), Intx(3, (1, 64)), NF4, MXFP4, Float8(), ACTIVATIONS[0], *ACTIVATIONS[2:4], ACTIVATIONS[6]]
    )
    assert operators.count("MatMulInteger") == 1 and operators.count("DequantizeLinear") == 2


@pytest.mark.slow
def test_every_format():
    standard(WEIGHT_ONLY + ACTIVATIONS)


def standard(specs: list[Spec]) -> list[str]:
    """The operators of what `torch.onnx.export` makes."""
    model = Side(specs).eval()
    program = torch.onnx.export(model, (torch.randn(2, 3, K),), dynamo=True, verbose=False, dynamic_shapes=DYNAMIC)
    same(program, model, [(1, 1), (4, 7)])
    return [node.op_type for node in program.model_proto.graph.node]


def test_four_bits_are_stored_as_four_bits(tmp_path):
    specs = [Intx(4, (1, 32)), Intx(4, (1, 32), signed=False), Intx(4, (1, 32), symmetric=True), Intx(8, (1, 32))]
    model = Side(specs).eval()
    path = tmp_path / "model.onnx"
    program = export(model, (torch.randn(2, 3, K),), path, dynamic_shapes=DYNAMIC)
    same(program, model, [(1, 1), (4, 7)])
    assert weights(program) == [(INT8, K * 192), (INT4, K * 192), (UINT4, K * 192), (INT4, K * 192)]
    nodes = [node for node in program.model_proto.graph.node if node.op_type == "DequantizeLinear"]
    assert [{a.name: a.i for a in node.attribute} for node in nodes] == [{"axis": 1, "block_size": 32}] * 4
    packed = sum(layer.weight.nbytes_packed for layer in model.layers)
    assert path.stat().st_size < packed + 32_000  # the graph; a byte for each of the codes would be 37_000 more
    assert torch.equal(
        torch.from_numpy(
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
                None, {"x": torch.ones(1, 1, K).numpy()}
            )[0]
        ),
        run(program, torch.ones(1, 1, K)),
    )


class Tied(nn.Module):
    """An embedding and a head of one weight, another layer that uses it, and a pre-scaled one."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = nn.Parameter(spec.quantize(torch.randn(96, K)), requires_grad=False)
        self.embed, self.head, self.again = nn.Embedding(96, K), nn.Linear(K, 96, bias=False), nn.Linear(K, 96)
        self.embed.weight = self.head.weight = self.again.weight = table
        scaled = spec.quantize(torch.randn(K, K), pre_scale=torch.rand(1, K) + 0.5)
        self.middle = nn.Linear(K, K)
        self.middle.weight = nn.Parameter(scaled, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.middle(self.embed(ids))
        return self.head(x) + self.again(x)


@pytest.mark.parametrize("spec", [Intx(4, (1, 32))], ids=str)
def test_tied_weights_and_embeddings(spec):
    tied(spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [NF4, Float8(), Intx(8), Intx(3, (1, 32))], ids=str)
def test_more_embeddings(spec):
    tied(spec)


def tied(spec: Spec) -> None:
    model = Tied(spec).eval()
    ids = torch.tensor([[3, 5, 3], [0, 95, 1]])
    program = export(model, (ids,), dynamic_shapes=DYNAMIC)
    for more in (ids, torch.arange(8).view(1, 8)):
        torch.testing.assert_close(run(program, more), model(more), rtol=1e-3, atol=1e-3)
    kinds = [t.data_type for t in program.model_proto.graph.initializer]
    if spec == Intx(4, (1, 32)):
        assert kinds.count(INT4) == 4  # two weights and their zero points


def test_refusals():
    model = nn.Sequential(nn.Linear(K, K))
    with pytest.raises(ValueError, match="opset_version must be at least 21"):
        export(model, (torch.randn(2, K),), opset_version=20)
    layout = ao.dtypes.Int4CPULayout()
    for config in (ao.Int4WeightOnlyConfig(group_size=32, layout=layout), BlockSparse(64)):
        model = nn.Sequential(nn.Linear(K, K)).eval()
        ao.quantize_(model, config)
        with pytest.raises(torch.onnx.errors.OnnxExporterError) as error:
            export(model, (torch.randn(2, K),))
        assert f"no product in the layout of {model[0].weight.spec}" in str(error.value.__cause__)


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("spec", [MXFP4, MXFP6, MXFP8, FloatX(3, 2), FloatX(5, 2), MXINT8], ids=str)
def test_small_floats_without_a_look_at_bits(monkeypatch, spec, rule):
    """The arithmetic that a model for ONNX has rounds as the bits do, at powers of two and at ties, too."""
    spec = replace(spec, scale_rule=rule)
    x = torch.randn(64, 64) * 2.0 ** torch.randint(-40, 40, (64, 1))
    x[:16] = 2.0 ** torch.randint(-9, 9, (16, 64)) * torch.randint(-17, 17, (16, 64)) / 16
    x[16] = 0
    expected = spec.quantize(x).dequantize()
    for module in ("e8m0", "floatx", "operand"):
        monkeypatch.setattr(f"ao.dtypes.{module}.reads_no_bits", lambda: True)
    assert torch.equal(spec.quantize(x).dequantize(), expected)


def test_a_program_for_elsewhere_is_as_before():
    """torch.export alone, after an export to ONNX, has what a CPU is fast with."""
    model = Side([Intx(4, (1, 32))]).eval()
    program = torch.export.export(model, (torch.randn(2, 3, K),))
    assert not any("onnx" in str(node.target) for node in program.graph.nodes)
