"""Nothing depends on PyTorch's default dtype and device, which scripts set to build a model in bfloat16 on a GPU."""

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, weight
from torch import nn

import ao
from ao.dtypes import Intx
from ao.optim import AdamW4bit, AdamW8bit, AdamWFp8, Lion8bit, SGD8bit
from ao.quant.kv_cache import KVCache

CREATORS = (
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "linspace",
    "eye",
    "tensor",
    "empty_strided",
    "scalar_tensor",
)
"""Functions of torch whose result has the default dtype where it is of floats."""

INTEGERS = ("arange", "randint", "randperm")
"""Others that make something on the default device."""


OPTIMIZERS = [AdamW8bit, AdamW4bit, AdamWFp8, Lion8bit, SGD8bit]


def equal_in_every_default(make):
    """`make()`, tensors on the CPU, is the same to the bit with other default dtypes, and another default device. It may not make
    numbers without a dtype and a device itself."""
    before = torch.get_default_dtype()
    found = []
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            found.append([t.clone() for t in make()])
        torch.set_default_dtype(before)
        with torch.device("meta"):
            found.append([t.clone() for t in make()])
    finally:
        torch.set_default_dtype(before)
    for others in found[1:]:
        for expected, t in zip(found[0], others, strict=True):
            assert t.dtype == expected.dtype and torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


def of_format(spec, w, x):
    """What a format makes of a weight, and products with it."""
    q = spec.quantize(w)
    with torch.no_grad():
        return [q.dequantize(), q.decode(torch.bfloat16), F.linear(x[:1], q), F.linear(x, q)]


def after_steps(cls, first, gradients):
    """A parameter after some steps."""
    p = nn.Parameter(first.clone())
    optimizer = cls([p], lr=1e-2)
    for p.grad in gradients:
        optimizer.step()
    return [p.detach()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_formats(case):
    w, x = weight((64, 256)), weight((5, 256), 1, torch.bfloat16)
    equal_in_every_default(lambda: of_format(case.spec, w, x))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_optimizers(cls):
    first, *gradients = (weight((16, 4096), seed) for seed in range(4))
    equal_in_every_default(lambda: after_steps(cls, first, gradients))


def digest():
    """Of formats and optimizers, in a process that has made no table before."""
    numbers = torch.Generator().manual_seed(0)
    w, x, first, *gradients = (
        torch.randn(size, generator=numbers, dtype=torch.float32) for size in ((64, 256), (5, 256), *[(16, 4096)] * 3)
    )
    made = [t for case in CASES for t in of_format(case.spec, w, x.bfloat16())]
    made += [t for cls in OPTIMIZERS for t in after_steps(cls, first, gradients)]
    return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in made)).hexdigest()


def test_tables_that_are_made_first():
    """They are kept: so each default has a process of its own."""
    program = (
        "import sys, torch; torch.set_default_dtype(getattr(torch, sys.argv[1]))\n"
        "import test_defaults; print(test_defaults.digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout
        for name in ("float32", "bfloat16")
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", ["int8", "int4", "float8", "kivi4", "kivi2"])
def test_attention_to_a_cache(name):
    q, k, v = (weight((1, heads, 72, 32), heads, torch.bfloat16) for heads in (4, 2, 2))

    def make():
        cache = KVCache(name, 1, 2, 96, 32, dtype=torch.bfloat16, device="cpu")
        outs = []
        for some in (slice(0, 70), slice(70, 71), slice(71, 72)):  # a prompt, and tokens
            cache.update(k[:, :, some], v[:, :, some])
            outs.append(cache.attend(q[:, :, some]))
        return outs

    equal_in_every_default(make)


@pytest.mark.parametrize("algorithm", ["rtn", "clip", "hqq", "gptq", "awq"])
def test_algorithms(algorithm):
    x, state = weight((32, 64), 3), {"0.weight": weight((64, 64)), "0.bias": weight((64,), 1)}

    def make():
        model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float32, device="cpu"))
        model.load_state_dict(state)
        ao.quantize_(model, ao.SpecConfig(Intx(4, (1, 32)), algorithm=algorithm), calibration_data=[x])
        with torch.no_grad():
            return [model[0].weight.dequantize(), model(x)]

    equal_in_every_default(make)


def test_every_tensor_that_is_made_names_its_dtype_and_device():
    root = Path(ao.__file__).parent
    without: dict[str, list[str]] = {"dtype": [], "device": []}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asked = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "device"}
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr=name)) if name in CREATORS + INTEGERS:
                    given = {keyword.arg for keyword in node.keywords}
                    if None in given or id(node) in asked:  # None: of **kwargs
                        continue
                    if "dtype" not in given and name in CREATORS:
                        without["dtype"].append(f"{place}:{node.lineno}")
                    if "device" not in given:
                        without["device"].append(f"{place}:{node.lineno}")
    # Where nothing is given, bitsandbytes makes an empty parameter of the default dtype.
    assert [place for place in without["dtype"] if not place.startswith("compat/bitsandbytes/parameters.py")] == []
    # vLLM builds its layers within a default device; an empty tensor of bytes is asked for its kind alone.
    chosen = ("compat/", "integrations/vllm.py", "dtypes/checkpoint.py")
    assert [place for place in without["device"] if not place.startswith(chosen)] == []
