"""The step on a CPU by C++, made of the rule and the formats of a plan: the bits of the eager step, at the speed of memory.

The formulas are printed from what defines them in PyTorch (ao/dtypes/cpp_vectors.py): the rule, the entries of each format, the
nearest codes, the scales, and rounding at random. So a rule or a format is written once. A compiler needs two seconds, once per plan
and dtypes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import Float8, Mapped, Spec, VECTORS, NotElementwise, cpp_compiler, cpp_function, cpp_library, instructions

from .cpu_source import SOURCE
from .kernel import Plan
from .rows import CHUNK, Rows
from .stochastic_rounding import stochastic_round, stochastic_round_e4m3

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

PIECE = 1024
"""Elements at a time of states in full precision."""

WIDEST = 2048
"""The largest block that is taken (MOST in the source)."""

Step = Callable[[Rows, Tensor, int], None]


class _Fields(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


@functools.cache
def cpu_step(plan: Plan, dtype: torch.dtype, grad_dtype: torch.dtype) -> Any:
    """The compiled function for a plan; None where there is none."""
    specs = [spec for _, spec in plan.states]
    widths = {spec.block[-1] for spec in specs if spec is not None}
    if cpp_compiler() is None or dtype not in _DTYPES or grad_dtype not in _DTYPES or len(widths) > 1:
        return None
    if any(w % CHUNK or w > WIDEST for w in widths) or (widths and None in specs):
        return None
    try:
        text = _source(plan, dtype, grad_dtype)
    except NotElementwise:
        return None
    library = cpp_library(text, (*instructions(), "-ffp-contract=off", "-fwrapv", "-fno-math-errno"))
    if library is None:
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ao_step.argtypes = [pointer, pointer, ctypes.POINTER(_Fields), pointer, long, long, long, integer, integer, integer]
    library.ao_step.restype = None
    return library.ao_step


def run_rows(function: Any, plan: Plan, rows: Rows, hyper: Tensor, threads: int) -> None:
    """The step of one parameter, in place."""
    param, grad = rows.params[0], rows.grads[0]
    count, width = rows.shape
    fields = (_Fields * (len(rows.states) + 1))()
    for i, each in enumerate(rows.states):
        fields[i].codes = each[0].data_ptr() if len(each) > 1 else None
        fields[i].scale = each[-1].data_ptr()
    more = 0
    if not any(spec for _, spec in plan.states):
        count, width, more = count * width // PIECE, PIECE, count * width % PIECE
    seed, position = (0, 0) if rows.noise is None else rows.noise.tolist()
    threads = min(threads, max(count * width // 2**14, 1))
    function(param.data_ptr(), grad.data_ptr(), fields, hyper.data_ptr(), count, width, more, seed, position, threads)


def _source(plan: Plan, dtype: torch.dtype, grad_dtype: torch.dtype) -> str:
    specs = [spec for _, spec in plan.states]
    names = [name for name, _ in plan.states]
    bits = [0 if spec is None else spec.bits if isinstance(spec, Mapped) else 8 for spec in specs]
    float32, int32, n, m = torch.float32, torch.int32, len(specs), len(plan.scalars)

    def rule(param: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, h = dict(zip(names, rest)), dict(zip(plan.scalars, rest[n:]))
        grad = -grad if plan.maximize else grad
        new, made = plan.update(param, grad, states, h, **dict(plan.options))
        new = stochastic_round(new, *rest[n + m :]) if plan.stochastic else new.to(dtype)
        return (new, *(made[name] for name in names))

    text = [VECTORS]
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
                cpp_function(f"decode{i}", functools.partial(_decode, spec), [int32, float32]),
                cpp_function(f"scales{i}", functools.partial(_scales, spec), [float32]),
                cpp_function(f"encode{i}", functools.partial(_encode, spec, name == "exp_avg_sq"), [float32, float32]),
            ]
    for what, arguments in (
        ("decode", "vi a, vf b, vf& c"),
        ("scales", "vf a, vf& b, vf& c"),
        ("encode", "vf a, vf b, vi& c"),
    ):
        cases = "".join(f"  if (s == {i}) {what}{i}(a, b{', c'});\n" for i, spec in enumerate(specs) if spec is not None)
        text.append(f"INLINE void {what}(int s, {arguments}) {{\n{cases}}}\n")
    lanes = "vi{" + ", ".join(str(i) for i in range(16)) + "}"
    eight = "vi{" + ", ".join(str(i) for i in range(8)) + "}"
    text.append(
        f"#define STATES {n}\n#define HYPER {m}\n#define PARAM {_DTYPES[dtype]}\n#define GRAD {_DTYPES[grad_dtype]}\n"
        f"static constexpr int BITS[] = {{{', '.join(map(str, [*bits, 0]))}}};\n"
        f"#if W == 16\n#define IOTA {lanes}\n#else\n#define IOTA {eight}\n#endif\n"
    )
    return "".join([*text, SOURCE])


def _decode(spec: Any, codes: Tensor, scale: Tensor) -> Tensor:
    if isinstance(spec, Float8):
        return spec.numbers(codes) * scale
    return torch.tensor(spec.values)[codes.long()] * scale


def _scales(spec: Any, largest: Tensor) -> tuple[Tensor, Tensor]:
    scale = spec.scale(largest) if isinstance(spec, Mapped) else largest * (1 / spec.max)
    return scale, scale.reciprocal().masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)


def _encode(spec: Any, slow: bool, x: Tensor, inverse: Tensor) -> Tensor:
    q = x * inverse
    if isinstance(spec, Mapped):
        return spec.nearest(q)
    q = q.clamp(-spec.max, spec.max)
    return spec.codes(stochastic_round_e4m3(q) if slow else q)
