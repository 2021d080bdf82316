"""Products on a CPU, compiled: which path runs, what code it becomes, and in how many graphs."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch._inductor.utils import run_and_get_code

from ao import compute_error
from ao.dtypes import NF4, Float8, Intx
from ao.matmul import cpu, linear, made, path_name

SPECS = [Intx(4, (1, 128), signed=False), Intx(8), Intx(3, (1, 32)), Float8()]
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_token_stores_no_weight(spec):
    """At most three kernels, no dense weight, and the sum is that of float32 arithmetic."""
    n, k = 64, 512
    x, q = weight((1, k), 1), spec.quantize(weight((n, k)))
    with torch.no_grad():
        y, codes = run_and_get_code(torch.compile(F.linear, fullgraph=True), x, q)
    assert compute_error(x @ q.dequantize().t(), y) > 80
    if spec != Intx(8) and (AVX2 or getattr(spec, "bits", 8) < 8):
        assert f"empty_strided_cpu(({n}, {k})" not in codes[0]
        assert "extern_kernels.mm" not in codes[0]
    assert codes[0].count("cpp_fused") <= 12


@pytest.mark.parametrize("spec", [*SPECS, NF4, Intx(8, act=Intx(8))], ids=str)
def test_graphs_over_all_batches(spec):
    """Four graphs serve every number of tokens."""
    q = spec.quantize(weight((64, 256), dtype=torch.bfloat16))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    linear = torch.compile(F.linear, backend=backend)
    for tokens in (16, 1, 2, 4, 5, 8, 9, 64, 300):
        linear(weight((tokens, 256), 1, torch.bfloat16), q)
    assert len(graphs) <= 4


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("gap", [0, 3, 8])
@pytest.mark.parametrize("shape", [(2, 64), (3, 64), (16, 72), (7, 8), (8, 64)], ids=str)
def test_weights_that_end_where_memory_ends(shape, gap, tokens):
    """Where a file is mapped, a weight may begin anywhere, and end at the end of a page with nothing behind it."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    n = math.prod(shape)
    page = mmap.PAGESIZE
    base = libc.mmap(None, ctypes.c_size_t(2 * page), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_size_t(0))
    try:
        libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 0)
        codes = torch.frombuffer((ctypes.c_int8 * n).from_address(base + page - n - gap), dtype=torch.int8).reshape(
            shape
        )
        q = Intx(8).quantize(weight(shape, dtype=torch.bfloat16))
        codes.copy_(q.qdata)
        end = q.spec.wrap({"qdata": codes, "scale": q.scale}, q.dtype, q.shape)
        x = weight((tokens, shape[1]), 1, torch.bfloat16)
        assert torch.equal(F.linear(x, end), F.linear(x, q))
    finally:
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(2 * page))


def test_no_int8pack_above_three_tokens():
    q = Intx(8).quantize(weight((64, 256), dtype=torch.bfloat16))
    linear = torch.compile(F.linear, fullgraph=True, dynamic=True)
    with torch.no_grad():
        _, codes = run_and_get_code(linear, weight((9, 256), 1, torch.bfloat16), q)
    assert "_weight_int8pack_mm" not in "".join(codes)


@pytest.mark.parametrize(
    "spec", [Intx(4, (1, 32)), Intx(4, (1, 64), symmetric=True), Intx(4, (1, 64), zero_point="float")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_in_the_layout_of_aten(spec, dtype, monkeypatch):
    """Made at the first eager call, made anew when the weight is written, and not beyond what they may take."""
    monkeypatch.setattr(made, "cpp_compiler", lambda: None)
    monkeypatch.setattr(linear, "_CHOICES", {})
    x, q = weight((3, 128), 1).to(dtype), spec.quantize(weight((32, 128)))
    with torch.no_grad():
        assert path_name(x, q) == "kept"
        assert compute_error(x.float() @ q.dequantize().t(), F.linear(x, q).float()) > (
            80 if dtype == torch.float32 else 44
        )
        copy = q.cpu_copy
        F.linear(x, q)
        assert q.cpu_copy is copy
        q[:16].mul_(2)
        assert compute_error(x.float() @ q.dequantize().t(), F.linear(x, q).float()) > (
            80 if dtype == torch.float32 else 44
        )
        assert q.cpu_copy is not copy
        before = cpu._Copy.total
        del q.cpu_copy, copy
        assert cpu._Copy.total < before
        monkeypatch.setattr(cpu, "KEPT_BYTES", 0)
        F.linear(x, q)
        assert "cpu_copy" not in q.__dict__
