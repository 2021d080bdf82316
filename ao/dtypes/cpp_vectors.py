"""An elementwise function of PyTorch as C++ over vectors: the same operators in the same order, so the same bits.

The function is traced, once, and each operator is printed as a line on vectors of W floats (`vf`) or integers (`vi`), the vector
types of GCC and Clang. Products and sums are not to be fused by the compiler (`-ffp-contract=off`): eager PyTorch does not, either.
What is written here are only the operators that formats and update rules use; a function with others is left to other ways.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

VECTORS = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Lanes of a vector.
#if !defined(W)
#if defined(__AVX512F__)
#define W 16
#else
#define W 8
#endif
#endif

typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE T load(const void* p) { T t; memcpy(&t, p, sizeof(T)); return t; }
template <class T> INLINE void store(void* p, T t) { memcpy(p, &t, sizeof(T)); }
INLINE vf same(float f) { return f - vf{}; }
INLINE vi same(int32_t i) { return i - vi{}; }

// Of floats, NaN where x is NaN; y is a number.
INLINE vf at_least(vf x, vf y) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)y, (__m512)x);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)y, (__m256)x);
#else
  return x < y ? y : x;
#endif
}
INLINE vf at_most(vf x, vf y) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)y, (__m512)x);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)y, (__m256)x);
#else
  return x > y ? y : x;
#endif
}
INLINE vi at_least(vi x, vi y) { return x > y ? x : y; }
INLINE vi at_most(vi x, vi y) { return x < y ? x : y; }
INLINE vf larger(vf x, vf y) { vf most = at_least(x, y); return y == y ? most : y; }
INLINE vf smaller(vf x, vf y) { vf least = at_most(x, y); return y == y ? least : y; }
INLINE vi larger(vi x, vi y) { return at_least(x, y); }
INLINE vi smaller(vi x, vi y) { return at_most(x, y); }
INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  UNROLL for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// table[q] for indices below SIZE. What is gathered is merged into a register, by a mask: into zeros, else it waits for what was
// there before. A compiler leaves the zeros out if it knows that the mask is full; so it must not know.
template <int SIZE> INLINE vf look_up(const float* table, vi q) {
#if defined(__AVX512F__)
  if (SIZE <= 16) return (vf)_mm512_permutexvar_ps((__m512i)q, _mm512_loadu_ps(table));
  __mmask16 all = 0xFFFF;
  asm("" : "+Yk"(all));
  return (vf)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, (__m512i)q, table, 4);
#elif W == 8 && defined(__AVX2__)
  if (SIZE <= 8) return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)q);
  if (SIZE <= 16) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)q);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)q);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(q << 28));
  }
  __m256 all = (__m256)same((int32_t)-1);
  asm("" : "+x"(all));
  return (vf)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, (__m256i)q, all, 4);
#else
  vf out;
  UNROLL for (int i = 0; i < W; i++) out[i] = table[q[i]];
  return out;
#endif
}
template <int SIZE> INLINE vi look_up(const int32_t* table, vi q) { return (vi)look_up<SIZE>((const float*)table, q); }

// W bytes, or numbers of 16 bits, as integers.
INLINE vi from_bytes(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif W == 8 && defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load<vb>(p), vi);
#endif
}
INLINE vi from_halves(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif W == 8 && defined(__AVX2__)
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(load<vh>(p), vi);
#endif
}

// Integers below 256, or below 65536, as bytes or numbers of 16 bits: N vectors, an even number.
template <int N> INLINE void to_bytes(uint8_t* p, const vi* q) {
#if defined(__AVX512F__)
  UNROLL for (int i = 0; i < N; i++) _mm_storeu_si128((__m128i*)(p + i * W), _mm512_cvtepi32_epi8((__m512i)q[i]));
#elif W == 8 && defined(__AVX2__)
  UNROLL for (int i = 0; i < N; i += 4) {
    __m256i a = _mm256_packus_epi32((__m256i)q[i], (__m256i)q[i + 1]);
    __m256i b = N > 2 ? _mm256_packus_epi32((__m256i)q[i + 2], (__m256i)q[i + 3]) : a;
    // Packing is within halves of a register.
    __m256i all = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if (N > 2) _mm256_storeu_si256((__m256i*)(p + i * W), all);
    else _mm_storeu_si128((__m128i*)(p + i * W), _mm256_castsi256_si128(all));
  }
#else
  UNROLL for (int i = 0; i < N; i++) store(p + i * W, __builtin_convertvector(q[i], vb));
#endif
}
template <int N> INLINE void to_halves(uint16_t* p, const vi* q) {
#if defined(__AVX512F__)
  UNROLL for (int i = 0; i < N; i++) _mm256_storeu_si256((__m256i*)(p + i * W), _mm512_cvtepi32_epi16((__m512i)q[i]));
#elif W == 8 && defined(__AVX2__)
  UNROLL for (int i = 0; i < N; i += 2) {
    __m256i pair = _mm256_packus_epi32((__m256i)q[i], (__m256i)q[i + 1]);
    _mm256_storeu_si256((__m256i*)(p + i * W), _mm256_permute4x64_epi64(pair, 0xD8));
  }
#else
  UNROLL for (int i = 0; i < N; i++) store(p + i * W, __builtin_convertvector(q[i], vh));
#endif
}

// Rounded to bfloat16, to even; NaN stays NaN.
INLINE vf to_bf16(vf x) {
  vi w = (vi)x;
  vi rounded = w + 0x7FFF + ((w >> 16) & 1) | (vi)((vu)(x != x) << 22);
  return (vf)(rounded & (int32_t)0xFFFF0000);
}

// Numbers of a dtype as floats, W of them, and back, N vectors: of bfloat16, numbers that are rounded.
#define F32 0
#define BF16 1
INLINE vf floats(const void* p, int64_t i, int dtype) {
  return dtype == BF16 ? (vf)(from_halves((const uint16_t*)p + i) << 16) : load<vf>((const float*)p + i);
}
template <int N> INLINE void put(void* p, int64_t at, const vf* x, int dtype) {
  if (dtype == BF16) {
    vi halves[N];
    UNROLL for (int i = 0; i < N; i++) halves[i] = (vi)((vu)x[i] >> 16);
    to_halves<N>((uint16_t*)p + at, halves);
  } else {
    UNROLL for (int i = 0; i < N; i++) store((float*)p + at + i * W, x[i]);
  }
}
"""
"""The vector types and what the printed lines call."""

_TYPES = {torch.float32: "vf", torch.bfloat16: "vf", torch.int32: "vi", torch.int64: "vi", torch.uint8: "vi", torch.bool: "vi"}
"""What a tensor of a dtype becomes: indices have 32 bits as well, bytes are in integers, truths are masks."""

_INFIX = {
    "mul": "*", "add": "+", "sub": "-", "div": "/", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
    "__and__": "&", "__or__": "|", "__xor__": "^", "logical_and": "&", "logical_or": "|",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "__lshift__": "<<", "__rshift__": ">>", "bitwise_left_shift": "<<", "bitwise_right_shift": ">>",
}  # fmt: skip
_CALLS = {"maximum": "larger", "minimum": "smaller", "abs": "magnitude", "sqrt": "root"}
_SAME = {"detach", "alias", "clone", "lift_fresh_copy", "view", "expand", "reshape", "unsqueeze", "squeeze"}


class NotElementwise(Exception):
    """An operator that has no line."""


def cpp_function(name: str, function: Callable[..., Any], inputs: Sequence[torch.dtype]) -> str:
    """`INLINE void name(inputs..., outputs&...)` in C++, which computes `function` of tensors of these dtypes.

    It returns a tensor or a tuple of tensors. Raises NotElementwise for a function with another operator.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        graph = make_fx(lambda *given: function(*given))(*(torch.ones(2, dtype=dtype) for dtype in inputs))
    except RuntimeError as error:
        raise NotElementwise(str(error)) from error
    tables: list[str] = []
    lines: list[str] = []
    names: dict[str, str] = {}
    arguments: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            names[node.name] = f"x{len(arguments)}"
            arguments.append(f"{_TYPES[inputs[len(arguments)]]} x{len(arguments)}")
        elif node.op == "get_attr":
            value = getattr(graph, node.target)
            names[node.name] = f"{name}_table{len(tables)}" if value.dim() else f"same({_literal(value.item(), value.dtype)})"
            if value.dim():
                tables.append(_table(names[node.name], value))
        elif node.op == "call_function" and _is_same(node):
            names[node.name] = names[node.args[0].name]
        elif node.op == "call_function":
            value = node.meta.get("val", node.meta.get("tensor_meta"))
            names[node.name] = f"t{len(lines)}"
            lines.append(f"  const {_TYPES[value.dtype]} t{len(lines)} = {_expression(node, names, value.dtype)};")
        else:
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            for i, result in enumerate(results):
                arguments.append(f"{_TYPES[_dtype(result)]}& y{i}")
                lines.append(f"  y{i} = {names[result.name]};")
    return "\n".join([*tables, f"INLINE void {name}({', '.join(arguments)}) {{", *lines, "}\n"])


def _is_same(node: Any) -> bool:
    kind = node.target._schema.name.removeprefix("aten::")
    return kind in _SAME and node.target._overloadname != "dtype"


def _dtype(node: Any) -> torch.dtype:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    return value.dtype


def _expression(node: Any, names: dict[str, str], dtype: torch.dtype) -> str:
    """One operator. dtype: of its result."""
    kind = node.target._schema.name.removeprefix("aten::").rstrip("_") if hasattr(node.target, "_schema") else str(node.target)
    if kind.startswith("__"):
        kind = node.target._schema.name.removeprefix("aten::")
    operands = [a for a in node.args if isinstance(a, (torch.fx.Node, int, float, bool))]
    kinds = [_dtype(a) for a in operands if isinstance(a, torch.fx.Node)]
    wide = next((d for d in kinds if d.is_floating_point), kinds[0] if kinds else dtype)

    def text(a: Any) -> str:
        if isinstance(a, torch.fx.Node):
            return names[a.name]
        return f"same({_literal(a, wide)})"

    if node.kwargs.get("alpha", 1) != 1 or (kind in ("add", "sub") and len(node.args) > 2):
        raise NotElementwise(f"{kind} with alpha")
    if kind in ("rsub",):
        a, b = map(text, operands)
        return f"{b} - {a}"
    if kind in _INFIX:
        a, b = map(text, operands)
        return f"(vi)({a} {_INFIX[kind]} {b})" if dtype == torch.bool else f"{a} {_INFIX[kind]} {b}"
    if kind in _CALLS:
        return f"{_CALLS[kind]}({', '.join(map(text, operands))})"
    if kind in ("_to_copy", "to"):
        return _converted(text(operands[0]), kinds[0], dtype)
    if kind == "view" and node.target._overloadname == "dtype":
        return f"({_TYPES[dtype]}){text(operands[0])}"
    if kind == "neg":
        return f"-{text(operands[0])}"
    if kind == "reciprocal":
        return f"same(1.0f) / {text(operands[0])}"
    if kind in ("floor",):
        raise NotElementwise(kind)
    if kind in ("clamp", "clamp_min", "clamp_max"):
        x, *limits = node.args
        low, high = {"clamp": [*limits, None, None][:2], "clamp_min": [limits[0], None], "clamp_max": [None, limits[0]]}[kind]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        found = text(x)
        found = found if low is None else f"at_least({found}, {text(low)})"
        return found if high is None else f"at_most({found}, {text(high)})"
    if kind == "where":
        mask, *values = node.args
        known = [_dtype(v) for v in values if isinstance(v, torch.fx.Node)]
        wide = known[0] if known else dtype
        return f"{names[mask.name]} ? {text(values[0])} : {text(values[1])}"
    if kind == "masked_fill":
        x, mask, value = node.args
        wide = dtype
        return f"{names[mask.name]} ? {text(value)} : {text(x)}"
    if kind == "copysign":
        size, sign = map(text, operands)
        return f"(vf)(((vi){size} & 0x7FFFFFFF) | ((vi){sign} & (int32_t)0x80000000))"
    if kind == "sign" and dtype.is_floating_point:
        x = text(operands[0])
        return f"{x} > 0 ? same(1.0f) : ({x} < 0 ? same(-1.0f) : same(0.0f))"
    if kind in ("logical_not", "bitwise_not"):
        return f"~{text(operands[0])}"
    if kind in ("scalar_tensor", "full", "full_like", "zeros_like", "ones_like"):
        wide = dtype
        number = {"zeros_like": 0, "ones_like": 1, "scalar_tensor": node.args[0]}.get(kind, node.args[-1])
        return f"same({_literal(number, dtype)})"
    if kind == "index":
        table, (index,) = node.args
        size = table.meta["val"].numel()
        return f"look_up<{size}>({names[table.name]}, {names[index.name]})"
    raise NotElementwise(f"{node.target} has no line of C++")


def _converted(x: str, given: torch.dtype, wanted: torch.dtype) -> str:
    if given == torch.bool:
        return f"__builtin_convertvector({x} & 1, vf)" if wanted.is_floating_point else f"({x} & 1)"
    if wanted == torch.bool:
        return f"(vi)({x} != 0)"
    if wanted == torch.bfloat16:
        return x if given == wanted else f"to_bf16({x})"
    if given.is_floating_point != wanted.is_floating_point:
        x = f"__builtin_convertvector({x}, {_TYPES[wanted]})"
    return f"({x} & 255)" if wanted == torch.uint8 else x


def _literal(number: float, dtype: torch.dtype) -> str:
    if dtype.is_floating_point and not math.isfinite(number):
        return "NAN" if math.isnan(number) else "INFINITY" if number > 0 else "-INFINITY"
    if dtype.is_floating_point:
        return f"{struct.unpack('f', struct.pack('f', number))[0].hex()}f"
    wrapped = (int(number) + 2**31) % 2**32 - 2**31
    return f"(int32_t){wrapped}" if wrapped > -(2**31) else "(int32_t)0x80000000"


def _table(name: str, values: Tensor) -> str:
    """An array, of whole vectors."""
    kind = "float" if values.dtype.is_floating_point else "int32_t"
    numbers = values.tolist() + [0] * (-len(values) % 16)
    text = ", ".join(_literal(v, values.dtype) for v in numbers)
    return f"alignas(64) static const {kind} {name}[] = {{{text}}};"
