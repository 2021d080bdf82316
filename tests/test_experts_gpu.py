"""Rows routed to quantized experts, on a GPU: each reads the codes of its expert, in eager mode, compiled and in CUDA graphs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch._inductor.utils import run_and_get_code

from ao import compute_error, quantize_
from ao.dtypes import FP6, MXFP4, MXFP8, MXINT8, NF4, NVFP4, Codebook, Float8, Intx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SPECS = [
    Intx(4, (1, 128), signed=False),
    Intx(4, (1, 32), signed=False, zero_point="joint"),
    Intx(4),
    Intx(8),
    Intx(8, (1, 64), signed=False, symmetric=False),
    Intx(3, (1, 64)),
    Float8(),
    Float8("e5m2"),
    NF4,
    MXFP4,
    NVFP4,
    FP6,
    MXFP8,
    MXINT8,
]

E, N, K = 5, 328, 768
ENDS = ([0, 2, 2, 6, 7], [0, 2, 2, 5, 5], [0, 0, 7, 7, 7], [0, 0, 0, 0, 0])
"""Where the rows of each expert end: experts without rows, rows of no expert, all rows of one expert, none of any."""


def case(spec, dtype=torch.bfloat16, rows=7, n=N, k=K):
    """Rows that differ in size, and experts, (E, N, K)."""
    x = weight((rows, k), 1) * torch.logspace(-1, 1, rows).unsqueeze(1)
    return x.to(dtype).cuda(), spec.quantize(weight((E, n, k), 2, dtype=dtype).cuda())


def ids(*experts):
    return torch.tensor(experts, device="cuda")


def ends(*rows):
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def of_ends(offs, rows):
    """The expert of each row; E for none."""
    return [sum(end <= row for end in offs) for row in range(rows)]


def sqnr(x, q, experts, out):
    """The worst row, in dB, against float32 arithmetic on the decoded experts. Rows of no expert are zero."""
    w = q.dequantize().float()
    worst = float("inf")
    for row, e in enumerate(experts):
        if e < len(w):
            worst = min(worst, compute_error(x[row].float() @ w[e].t(), out[row].float()).item())
        else:
            assert not out[row].any()
    return worst


@contextmanager
def no_waiting():
    """An error wherever the host would wait for the GPU."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch says that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def grouped(x, w, offs):
    return F.grouped_mm(x, w.transpose(-2, -1), offs=offs)


def gathered(x, w, experts):
    """As transformers' `batched_mm` does, for weights stored either way round."""
    return torch.bmm(w[experts], x.unsqueeze(-1)).squeeze(-1)


def gathered_turned(x, w, experts):
    return torch.bmm(x.unsqueeze(1), w.mT[experts]).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_eager(spec, dtype):
    x, q = case(spec, dtype)
    experts = [4, 0, 3, 3, 1, 0, 2]
    where, ways = ids(*experts), [ends(*rows) for rows in ENDS]
    torch.cuda.synchronize()
    with no_waiting():
        outs = [grouped(x, q, offs) for offs in ways]
        each = [gathered(x, q, where), gathered_turned(x, q, where)]
    for rows, out in zip(ENDS, outs):
        assert sqnr(x, q, of_ends(rows, 7), out) > 46
    assert all(sqnr(x, q, experts, out) > 46 for out in each)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_compiled(spec):
    """A graph holds the operator alone: the memory of a call is not even that of one packed expert."""
    x, q = case(spec)
    experts = [4, 0, 3, 3, 1, 0, 2]
    for function, where, expected in (
        (grouped, ends(*ENDS[1]), of_ends(ENDS[1], 7)),
        (gathered, ids(*experts), experts),
        (gathered_turned, ids(*experts), experts),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True)
        out, code = run_and_get_code(compiled, x, q, where)
        assert "ao.routed" in "".join(code) and sqnr(x, q, expected, out) > 46
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compiled(x, q, where)
        assert torch.cuda.max_memory_allocated() - before < q[0].nbytes_packed
    torch.compiler.reset()


@torch.no_grad()
def test_any_number_of_rows():
    """One graph for few rows and one for many, in which experts are decoded once for all of their rows."""
    q = case(SPECS[0])[1]
    compiled = torch.compile(grouped, dynamic=True, fullgraph=True)
    for rows in (2, 7, 64, 65, 200):
        x = case(SPECS[0], rows=rows)[0]
        offs = [0, rows // 3, rows // 3, rows - 1, rows]
        for out in (compiled(x, q, ends(*offs)), grouped(x, q, ends(*offs))):
            assert sqnr(x, q, of_ends(offs, rows), out) > 42
    torch.compiler.reset()


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[6], NF4], ids=str)
@torch.no_grad()
def test_cuda_graph(spec):
    """What is recorded once goes to the experts that are asked for at each replay."""
    x, q = case(spec)
    offs, where = ends(*ENDS[0]), ids(0, 1, 2, 3, 4, 0, 1)

    def step():
        return grouped(x, q, offs), gathered(x, q, where)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sorted_rows, each = step()
    for rows, experts in zip(ENDS, ([4] * 7, [1, 3, 0, 2, 2, 4, 0], [0] * 7, [2, 1, 2, 1, 2, 1, 2])):
        offs.copy_(ends(*rows))
        where.copy_(ids(*experts))
        graph.replay()
        assert sqnr(x, q, of_ends(rows, 7), sorted_rows) > 46
        assert sqnr(x, q, experts, each) > 46


@pytest.mark.parametrize(("n", "k"), [(17, 96), (48, 4096)])
@pytest.mark.parametrize(
    "spec", [Codebook(tuple(float(i**3) for i in range(-8, 8)), (1, 32)), NVFP4, FP6, MXFP8], ids=str
)
@torch.no_grad()
def test_experts_that_begin_anywhere(spec, n, k):
    """Codes and scales of an expert may begin where no word of 16 bytes does; and rows of more warps."""
    x, q = case(spec, n=n, k=k)
    for rows in ENDS:
        assert sqnr(x, q, of_ends(rows, 7), grouped(x, q, ends(*rows))) > 46


@torch.no_grad()
def test_more_rows_than_a_launch():
    x, q = case(SPECS[0], rows=2**14 + 3)
    experts = torch.arange(len(x), device="cuda") % E
    out = torch.compile(gathered, fullgraph=True)(x, q, experts)
    last = slice(2**14 - 2, None)
    assert sqnr(x[last], q, experts[last].tolist(), out[last]) > 46
    torch.compiler.reset()


def test_what_the_kernels_do_not_take():
    """A format that they do not read, and gradients: decoded, as before."""
    x, q = case(Float8("e5m2", (1, 32)))
    with torch.no_grad():
        assert sqnr(x, q, of_ends(ENDS[0], 7), grouped(x, q, ends(*ENDS[0]))) > 42
        assert sqnr(x, q, [4, 0, 3, 3, 1, 0, 2], gathered(x, q, ids(4, 0, 3, 3, 1, 0, 2))) > 42
    x, q = case(SPECS[0])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(gathered(x, q, ids(*range(5), 0, 1)).float().sum(), x)
    expected = q.dequantize().float().sum(1)[ids(*range(5), 0, 1)]
    assert compute_error(expected, grad.float()) > 40


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")  # of transformers
@torch.no_grad()
def test_a_token_of_mixtral():
    """The step that transformers' `generate` compiles."""
    pytest.importorskip("transformers")
    import hf_models

    model = hf_models.mixtral().bfloat16().cuda().eval()
    quantize_(model, Intx(4, (1, 32), signed=False))
    tokens = torch.tensor([[5], [9]], device="cuda")
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        torch.compiler.reset()
        out, code = run_and_get_code(torch.compile(model, fullgraph=True), tokens)
        assert compute_error(expected, out.logits) > 30
        text = "".join(code)
        assert (
            text.count("ao.routed.default(") == 4 and "_grouped_mm.default(" not in text
        )  # two products in each of two blocks
    torch.compiler.reset()
