"""Other libraries' quantized linear layers, for the benchmarks to compare with: one function per library.

Each takes a bfloat16 weight (N, K) and the name of a format of ours, and returns a module that maps (M, K) to (M, N), or
None where the library has nothing like it. What it raises is the reason why it does not run. A library is imported when it
is asked for; none is needed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Adapter = Callable[[Tensor, str], "nn.Module | None"]


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def torchao(weight: Tensor, name: str) -> nn.Module | None:
    """The formats of the same names; int4 is its tinygemm layout, the one that needs no other package."""
    q: Any = import_module("torchao.quantization")

    def int4(group: int) -> Any:
        return q.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")

    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "int4-g128": lambda: int4(128),
        "int4-g32": lambda: int4(32),
        "float8": lambda: q.Float8WeightOnlyConfig(),
        "int8-dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "float8-dynamic": lambda: q.Float8DynamicActivationFloat8WeightConfig(),
    }
    if name not in configs:
        return None
    model = nn.Sequential(_layer(weight))
    q.quantize_(model, configs[name]())
    return model


def gemlite(weight: Tensor, name: str) -> nn.Module | None:
    """Its Triton kernels; the 4-bit codes are those of round-to-nearest over the range of each group."""
    g: Any = import_module("gemlite.helper")

    device = str(weight.device)
    whole = {
        "int8": "A16W8_INT8",
        "float8": "A16W8_FP8",
        "int8-dynamic": "A8W8_int8_dynamic",
        "float8-dynamic": "A8W8_fp8_dynamic",
    }
    if name in whole:
        return getattr(g, whole[name])(device=device, dtype=weight.dtype).from_linear(_layer(weight))
    if name not in ("int4-g128", "int4-g32"):
        return None
    groups = weight.float().view(-1, int(name.removeprefix("int4-g")))  # (N * K / group, group)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 15
    codes = ((groups - low) / scale).round().to(torch.uint8).view(weight.shape)
    return g.A16W4_HQQ_INT(device=device, dtype=weight.dtype).from_weights(codes, scale.to(weight.dtype), -low / scale)


def bitsandbytes(weight: Tensor, name: str) -> nn.Module | None:
    """LLM.int8() without outliers beside int8 activations, and NF4, which also stands beside int4."""
    b: Any = import_module("bitsandbytes.nn")

    n, k = weight.shape
    if name == "int8-dynamic":
        layer = b.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = b.Int8Params(weight.cpu().clone(), requires_grad=False, has_fp16_weights=False)
        return layer.to(weight.device)
    if name in ("nf4", "int4-g128", "int4-g32"):
        layer = b.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        layer.weight = b.Params4bit(weight.cpu().clone(), requires_grad=False, quant_type="nf4")
        return layer.to(weight.device)
    return None


def hqq(weight: Tensor, name: str) -> nn.Module | None:
    """Its own layer in PyTorch, which decodes the weight and multiplies. Chosen without its optimizer: same speed, sooner."""
    h: Any = import_module("hqq.core.quantize")

    sizes = {"int8": (8, None), "int4-g128": (4, 128), "int4-g32": (4, 32), "int3": (3, 128), "int2": (2, 128)}
    if name not in sizes:
        return None
    bits, group = sizes[name]
    config = h.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    config["weight_quant_params"]["optimize"] = False
    return h.HQQLinear(_layer(weight), config, compute_dtype=weight.dtype, device=str(weight.device))


def quanto(weight: Tensor, name: str) -> nn.Module | None:
    """Weight-only qint8, qint4 (its groups are of 128) and qfloat8."""
    q: Any = import_module("optimum.quanto")

    types = {"int8": "qint8", "int4-g128": "qint4", "float8": "qfloat8"}
    if name not in types:
        return None
    model = nn.Sequential(_layer(weight))
    q.quantize(model, weights=getattr(q, types[name]))
    q.freeze(model)
    return model


PEERS: dict[str, Adapter] = {
    "torchao": torchao,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    "optimum-quanto": quanto,
}
"""By the name that the library is installed under."""


def version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def settings_restored() -> Iterator[None]:
    """Undo what a library does to settings of the whole process, which it shares with the others under test."""
    import torch._inductor.config as inductor

    saved, precision = inductor.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        for key, value in inductor.get_config_copy().items():
            if value != saved[key]:
                setattr(inductor, key, saved[key])
        torch.set_float32_matmul_precision(precision)
