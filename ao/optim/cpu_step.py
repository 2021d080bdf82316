"""The step on a CPU by C++, made of the rule and the formats of a plan: the bits of the eager step, at the speed of memory.

The formulas are printed from what defines them in PyTorch (ao/dtypes/cpp_vectors.py): the rule, the entries of each format,
the nearest codes, the scales, and rounding at random. So a rule or a format is written once. A compiler needs a second for it,
once per plan and dtypes; for Inductor, whose code is that of its own headers, the same took ten, and it ran half as fast.

Roots are correctly rounded here. Those of eager code are MKL's, of which one in two hundred is the number next to it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import (
    CPP_VECTORS,
    DynamicTree,
    Float8,
    Mapped,
    NotElementwise,
    cpp_compiler,
    cpp_function,
    cpp_instructions,
    cpp_library,
)

from .code_tables import code_tables
from .cpu_source import SOURCE
from .kernel import Plan
from .rows import CHUNK, Rows
from .stochastic_rounding import stochastic_bf16, stochastic_bytes_e4m3

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

PIECE = 1024
"""Elements at a time of states in full precision."""

SHARE = 2**14
"""Elements that are worth another thread."""

WIDEST = 2048
"""The largest block that is taken (MOST in the source)."""

Step = Callable[[Rows, Tensor, "Tensor | None"], None]
"""The step of one parameter, in place: its rows, the numbers of the rule, and (seed, position) where it is rounded at random."""


class _Fields(ctypes.Structure):
    """`Fields` of the source."""

    _fields_ = [("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


@functools.cache
def cpu_step(plan: Plan, dtype: torch.dtype, grad_dtype: torch.dtype) -> Step | None:
    """The compiled step of a plan; None where there is no compiler, or it does not fit the source."""
    widths = {spec.block[-1] if spec else PIECE for _, spec in plan.states} or {PIECE}
    if dtype not in _DTYPES or grad_dtype not in _DTYPES or len(widths) > 1 or cpp_compiler() is None:
        return None
    (width,) = widths
    quantized = any(spec for _, spec in plan.states)
    if width % CHUNK or width > WIDEST or (quantized and not all(spec for _, spec in plan.states)):
        return None
    try:
        text = _source(plan, dtype, grad_dtype)
    except NotElementwise:
        return None
    library = cpp_library(text, (*cpp_instructions(), "-ffp-contract=off", "-fwrapv", "-fno-math-errno"))
    if library is None:
        return None
    function, pointer, long, integer = library.ao_step, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    function.restype = None
    function.argtypes = [*[pointer] * 2, ctypes.POINTER(_Fields), pointer, *[long] * 3, *[integer] * 3]

    def step(rows: Rows, hyper: Tensor, noise: Tensor | None) -> None:
        fields = (_Fields * max(len(rows.states), 1))()
        for given, each in zip(fields, rows.states):
            given.codes, given.scale = each[0].data_ptr() if quantized else None, each[-1].data_ptr()
        elements = math.prod(rows.shape)
        seed, position = (0, 0) if noise is None else noise.tolist()
        # Where the parameters come in planes, the first begins where all of them do.
        where = rows.params[0].data_ptr(), rows.grads[0].data_ptr(), fields, hyper.data_ptr()
        threads = min(torch.get_num_threads(), elements // SHARE + 1)
        function(*where, elements // width, width, elements % width, seed, position, threads)

    return step


def _source(plan: Plan, dtype: torch.dtype, grad_dtype: torch.dtype) -> str:
    specs = [spec for _, spec in plan.states]
    names = [name for name, _ in plan.states]
    bits = [0 if spec is None else spec.bits if isinstance(spec, Mapped) else 8 for spec in specs]
    float32, int32, n, m = torch.float32, torch.int32, len(specs), len(plan.scalars)

    def rule(param: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, h = dict(zip(names, rest)), dict(zip(plan.scalars, rest[n:]))
        grad = -grad if plan.maximize else grad
        new, made = plan.update(param, grad, states, h, **dict(plan.options))
        new = stochastic_bf16(new, *rest[n + m :]) if plan.stochastic else new  # else it is rounded when it is put
        return (new, *(made[name] for name in names))

    text = [CPP_VECTORS]
    text.append(cpp_function("rule_of", rule, [*[float32] * (2 + n + m), *[int32] * (2 * plan.stochastic)]))
    given = [f"old[{i}]" for i in range(n)] + [f"h[{i}]" for i in range(m)] + ["seed", "index"] * plan.stochastic
    made = ["p", *(f"made[{i}]" for i in range(n))]
    text.append(
        "INLINE void rule(vf param, vf grad, const vf* old, const vf* h, vi seed, vi index, vf& p, vf* made) {\n"
        f"  rule_of({', '.join(['param', 'grad', *given, *made])});\n}}\n"
    )
    for i, (name, spec) in enumerate(plan.states):
        if spec is not None:
            text += [
                cpp_function(f"decode{i}", _decode(spec), [int32, float32]),
                cpp_function(f"scales{i}", _scales(spec), [float32]),
                cpp_function(f"encode{i}", _encode(spec, slow=name == "exp_avg_sq"), [float32, float32]),
            ]
    for what, arguments in (
        ("decode", "vi a, vf b, vf& c"),
        ("scales", "vf a, vf& b, vf& c"),
        ("encode", "vf a, vf b, vi& c"),
    ):
        cases = "".join(
            f"  if (s == {i}) {what}{i}(a, b{', c'});\n" for i, spec in enumerate(specs) if spec is not None
        )
        text.append(f"INLINE void {what}(int s, {arguments}) {{\n{cases}}}\n")
    lanes = "vi{" + ", ".join(str(i) for i in range(16)) + "}"
    eight = "vi{" + ", ".join(str(i) for i in range(8)) + "}"
    text.append(
        f"#define STATES {n}\n#define HYPER {m}\n#define PARAM {_DTYPES[dtype]}\n#define GRAD {_DTYPES[grad_dtype]}\n"
        f"#define ROUNDED {'CUT' if plan.stochastic else 'PARAM'}\n"
        f"static constexpr int BITS[] = {{{', '.join(map(str, [*bits, 0]))}}};\n"
        f"#if W == 16\n#define IOTA {lanes}\n#else\n#define IOTA {eight}\n#endif\n"
    )
    return "".join([*text, SOURCE])


def _decode(spec: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """From codes (int32) and their scale to numbers, as `read` in rows.py."""
    entries = (
        spec.numbers(torch.arange(256, device="cpu"))
        if isinstance(spec, Float8)
        else torch.tensor(spec.values, dtype=torch.float32, device="cpu")
    )
    return lambda codes, scale: entries[codes.long()] * scale


def _scales(spec: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From the largest magnitude of a block to its scale and 1 / scale, as `scales` in rows.py."""

    def made(largest: Tensor) -> tuple[Tensor, Tensor]:
        scale = spec.scale(largest) if isinstance(spec, Mapped) else largest * (1 / spec.max)
        return scale, scale.reciprocal().masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)

    return made


def _encode(spec: Any, slow: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """From numbers and 1 / scale to codes (int32), as `write` in rows.py."""
    if isinstance(spec, Mapped):
        nearest = code_tables(spec, torch.device("cpu")).nearest if isinstance(spec, DynamicTree) else spec.nearest
        return lambda x, inverse: nearest(x * inverse)

    if slow:
        return lambda x, inverse: stochastic_bytes_e4m3(x * inverse)
    return lambda x, inverse: spec.codes(x * inverse)  # what is a few bits above the largest number is rounded to it
