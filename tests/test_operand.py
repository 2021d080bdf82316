"""What a format says of how its codes multiply: it is all that ao.matmul knows, so that a format from elsewhere is as fast."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, weight
from test_layers import model
from torch import Tensor

import ao
from ao.dtypes import (
    Cast,
    Elements,
    Float8,
    Intx,
    Operand,
    PerBlock,
    QTensor,
    Spec,
    amax_abs,
    amin_amax,
    dense,
    expand,
    pack,
    packed_dim,
    reciprocal,
    unpack,
)
from ao.dtypes.pairs import spread, unpack_codes
from ao.matmul import cpu_decode, linear, path_name

ROOMS = {
    "base",
    "bits",
    "blocks",
    "caching",
    "cpp",
    "lattice",
    "onnx_integers",
    "operand",
    "ops",
    "pairs",
    "pieces",
    "rounding",
    "tracing",
    "views",
}


def test_products_know_no_format():
    """What ao.matmul imports of ao.dtypes has no format in it."""
    for path in (Path(ao.__file__).parent / "matmul").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dtypes"):
                modules = {node.module} if "." in node.module else {f"dtypes.{alias.name}" for alias in node.names}
                assert modules <= {f"dtypes.{name}" for name in ROOMS}, f"{path.name}:{node.lineno}"


def test_every_path_has_the_name_of_its_function():
    for device, paths in linear.PATHS.items():
        names = [path.name for path in (*paths, *linear.PATHS[""] * (device != ""))]
        assert len(set(names)) == len(names) and all(path.name == path.run.__name__ for path in paths)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operand_is_the_numbers(case):
    """Read as operand.py says, it gives what the format decodes."""
    q = case.spec.quantize(weight())
    operand, shape = case.spec.operand(q), q.shape
    if operand is None:
        pytest.skip("has none")
    if operand.kind == "sparse24":
        part = operand.part
        numbers = numbers_of(part.spec.operand(part), part.shape) if isinstance(part, QTensor) else part
        numbers = spread(numbers, unpack_codes(operand.codes))
    else:
        numbers = numbers_of(operand, shape)
    torch.testing.assert_close(numbers, q.decode(), rtol=1e-6, atol=1e-6)


def numbers_of(operand: Operand, shape: torch.Size) -> Tensor:
    operand = operand.in_bytes()
    codes = operand.codes
    if operand.bits < 8:
        codes = unpack(codes, operand.bits, packed_dim(codes.shape, shape))
    values = operand.read(codes if operand.bits == 8 else codes.int())
    scale = expand(dense(operand.scale).float(), shape)
    zero = 0.0 if operand.zero_point is None else expand(dense(operand.zero_point).float(), shape)
    if operand.kind == "shifted":
        return (values - operand.offset) * scale - zero
    return (values - (operand.offset + zero)) * scale


@pytest.mark.parametrize(
    "spec",
    [
        Intx(8),
        Intx(8, narrow=True),
        Intx(8, signed=False),
        Intx(8, symmetric=False),
        Float8(),
        Float8("e5m2", (-1, -1)),
    ],
    ids=str,
)
def test_a_cast_is_the_codes(spec):
    x = weight()
    q, cast = spec.quantize(x), spec.cast()
    assert cast.zero_point == (getattr(q, "zero_point", None) is not None) and q.qdata.dtype == cast.dtype
    scaled = x * reciprocal(expand(q.scale, x.shape))
    if cast.zero_point:
        scaled = scaled.round() + expand(q.zero_point.float(), x.shape)
    elif not cast.dtype.is_floating_point:
        scaled = scaled.round()
    assert torch.equal(scaled.clamp(cast.low, cast.high).to(cast.dtype).float(), q.qdata.float())
    if cast.levels is not None:
        lo, hi = amin_amax(x, tuple(q.scale.shape))
        span = hi.clamp(min=0) - lo.clamp(max=0) if cast.zero_point else amax_abs(x, tuple(q.scale.shape))
        assert torch.equal(q.scale, span * (1 / cast.levels))
    assert Intx(4).cast() is None


@dataclass(frozen=True, repr=False)
class Steps(Spec):
    """A format of our own: unsigned codes of `bits` bits around the middle of their range, in other fields than ours."""

    bits: int = 4
    block: tuple[int, ...] = (1, 32)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        return {"step": amax_abs(x, grid) * (1 / (2 ** (self.bits - 1) - 1))}

    def encode(self, x: Tensor, *, step: Tensor) -> dict[str, Tensor | None]:
        q = (x * expand(reciprocal(step), x.shape)).round()
        if self.bits == 8:
            return {"numbers": q.to(torch.int8), "step": step}
        return {"numbers": pack(q + 2 ** (self.bits - 1), self.bits), "step": step}

    def operand(self, q) -> Operand:
        return Operand(q.numbers, q.step, bits=self.bits, offset=2 ** (self.bits - 1) if self.bits < 8 else 0)

    def cast(self) -> Cast | None:
        return Cast(torch.int8, -127, 127, levels=127) if self.bits == 8 else None


class StepsTensor(QTensor, spec=Steps):
    numbers: Elements
    step: PerBlock

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = self.numbers.float() if self.spec.bits == 8 else unpack(self.numbers, self.spec.bits).float()
        offset = 2 ** (self.spec.bits - 1) if self.spec.bits < 8 else 0
        return ((codes - offset) * expand(self.step, self.shape)).to(dtype)


@pytest.mark.parametrize(
    "spec, tokens, path",
    [
        (Steps(4), 3, "kept"),
        (Steps(8, (1, -1)), 1, "int8pack"),
        (Steps(8, (1, -1), act=Intx(8)), 5, "int_mm"),
        (Steps(8, (1, -1), act=Steps(8, (1, -1))), 5, "int_mm"),
        (Intx(8, act=Steps(8, (1, -1))), 5, "int_mm"),
    ],
    ids=str,
)
def test_a_format_from_elsewhere_has_the_paths(spec, tokens, path):
    q, x = spec.quantize(weight((64, 128))), weight((tokens, 128), 1, torch.bfloat16)
    with torch.no_grad():
        assert path_name(x, q) == path
        assert ao.compute_error(x.float() @ q.dequantize().t(), F.linear(x, q).float()) > (
            44 if spec.act is None else 35
        )


@pytest.mark.skipif(not (cpu_decode.AVX2 or cpu_decode.AVX512), reason="the paths are for vectors of this size")
def test_a_format_from_elsewhere_is_compiled_like_ours(monkeypatch):
    """One token: no dense weight; and a graph gets its fields, not the subclass."""
    taken, seen = [], []
    choose = linear._path
    monkeypatch.setattr(linear, "_path", lambda x, w: taken.append(choose(x, w)) or taken[-1])
    made = model(Steps(4), bias=False)[0]

    def backend(graph, inputs):
        seen.extend(type(t) for t in inputs)
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    x = weight((1, 64), 1)
    with torch.no_grad():
        y = torch.compile(made, backend=backend, fullgraph=True)(x)
    assert {p.name for p in taken} == {"sums" if cpu_decode.AVX512 else "words"}
    assert seen and not any(issubclass(t, QTensor) for t in seen)
    assert ao.compute_error(x @ made.weight.dequantize().t(), y) > 80


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_scale_and_a_zero_point_in_one_word(bits):
    """Both are there again: the zero point exactly, the scale but for a 16th of itself; and what is not finite."""
    spec = Intx(bits, (1, 32), signed=False, symmetric=False, zero_point="joint")
    scale = torch.logspace(-30, 30, 64).repeat_interleave(32).unsqueeze(1)  # each with all zero points
    zero_point = (torch.arange(32) * 2.0 ** (bits - 5)).repeat(64).unsqueeze(1)
    q = spec.quantize(torch.zeros(2048, 32), scale=scale, zero_point=zero_point)
    assert q.scale.words.dtype == torch.bfloat16 and q.zero_point is None
    assert torch.equal(q.zeros(), zero_point)
    torch.testing.assert_close(dense(q.scale), scale, rtol=1 / 15, atol=0)
    assert spec.quantize(torch.zeros(4, 64)).dequantize().eq(0).all()
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 64)
        x[0, 40] = value
        assert (~spec.quantize(x).dequantize()[0, 32:].isfinite()).any() and spec.quantize(x).dequantize()[
            1
        ].isfinite().all()
