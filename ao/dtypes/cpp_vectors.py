"""An elementwise function of PyTorch as C++ over vectors: the same operators in the same order, so the same bits.

The function is traced, once, and each operator is printed as a line on vectors of W floats (`vf`) or integers (`vi`), the
vector types of GCC and Clang. No compiler shall fuse products and sums (`-ffp-contract=off`), as eager PyTorch does not. What
is written here are only the operators that formats and update rules use; a function with others is left to other ways.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cpp import CPP_LANES

_VECTORS = r"""
#include <math.h>

typedef uint32_t vu __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), aligned(2), may_alias));

template <class T> INLINE void store(void* p, T t) { memcpy(p, &t, sizeof(T)); }
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
INLINE vf number_at_least(vf x, vf y) {  // y where x is NaN
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
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
INLINE vf rounded(vf x) {  // half to even
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif W == 8 && defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  UNROLL for (int i = 0; i < W; i++) x[i] = __builtin_rintf(x[i]);
  return x;
#endif
}
INLINE vi magnitude(vi x) { return x < 0 ? -x : x; }
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

// Without the sign's copies, as `>>` of numbers that are not negative.
INLINE vi shifted(vi x, int n) { return (vi)((vu)x >> n); }

// Rounded to bfloat16, to even; NaN stays NaN. The bits, and the number.
INLINE vi bf16_bits(vf x) {
  vi w = (vi)x, up = w + 0x7FFF + (shifted(w, 16) & 1);
  return shifted(x != x ? same((int32_t)-1) : up, 16);
}
INLINE vf to_bf16(vf x) { return (vf)(bf16_bits(x) << 16); }

// Numbers of a dtype as floats, W of them, and back, N vectors: rounded, or, as CUT, bfloat16 of numbers that are.
#define F32 0
#define BF16 1
#define CUT 2
INLINE vf floats(const void* p, int64_t i, int dtype) {
  if (dtype == F32) return load<vf>((const float*)p + i);
  const uint16_t* from = (const uint16_t*)p + i;
#if defined(__AVX512BW__)
  const __m512i at = (__m512i)(vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16);
  const __m512i given = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  return (vf)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, at, given);
#elif W == 8 && defined(__AVX2__)
  const __m256i at = (__m256i)vi{0x0100FFFF, 0x0302FFFF, 0x0504FFFF, 0x0706FFFF, 0x0908FFFF, 0x0B0AFFFF, 0x0D0CFFFF, 0x0F0EFFFF};
  return (vf)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from)), at);
#else
  return (vf)(from_halves(from) << 16);
#endif
}
template <int N> INLINE void put(void* p, int64_t at, const vf* x, int dtype) {
  if (dtype != F32) {
    vi halves[N];
    UNROLL for (int i = 0; i < N; i++) halves[i] = dtype == CUT ? shifted((vi)x[i], 16) : bf16_bits(x[i]);
    to_halves<N>((uint16_t*)p + at, halves);
  } else {
    UNROLL for (int i = 0; i < N; i++) store((float*)p + at + i * W, x[i]);
  }
}
"""

CPP_VECTORS = CPP_LANES + _VECTORS
"""The vector types and what the printed lines call."""

_TYPES = {torch.float32: "vf", torch.bfloat16: "vf"}
"""What a tensor of a dtype becomes, if not `vi`: indices have 32 bits there, bytes are in integers, truths are masks."""

_INFIX = {
    "mul": "*", "add": "+", "sub": "-", "div": "/", "rsub": "-",
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "logical_and": "&", "logical_or": "|",
    "__and__": "&", "__or__": "|", "__xor__": "^", "__lshift__": "<<", "__rshift__": ">>",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_FORMS = {
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "fmax": "number_at_least({0}, {1})",
    "abs": "magnitude({0})",
    "sqrt": "root({0})",
    "round": "rounded({0})",
    "neg": "-{0}",
    "bitwise_not": "~{0}",
    "reciprocal": "same(1.0f) / {0}",
    "isnan": "(vi)({0} != {0})",
    "where": "{0} ? {1} : {2}",
    "masked_fill": "{1} ? {2} : {0}",
    "copysign": "(vf)(((vi){0} & 0x7FFFFFFF) | ((vi){1} & (int32_t)0x80000000))",
    "sign": "{0} > 0 ? same(1.0f) : ({0} < 0 ? same(-1.0f) : same(0.0f))",
    "scalar_tensor": "{0}",
}
"""What an operator becomes, given its arguments."""

_SAME = {"detach", "alias", "lift_fresh_copy"}
"""Operators whose result is their argument."""


class NotElementwise(Exception):
    """A function has an operator that has no line."""


def cpp_function(name: str, function: Callable[..., Any], inputs: Sequence[torch.dtype]) -> str:
    """`INLINE void name(inputs..., outputs&...)` in C++, which computes `function` of tensors of these dtypes.

    function: from tensors of one shape to a tensor or a tuple of them. Tables that it looks up are tensors that it knows.
    Raises NotElementwise for a function with another operator.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda *given: function(*given))(*(torch.ones(2, dtype=dtype, device="cpu") for dtype in inputs))
    tables: list[str] = []
    lines: list[str] = []
    arguments: list[str] = []
    names: dict[Any, str] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"x{len(arguments)}"
            arguments.append(f"{_type(node)} {names[node]}")
        elif node.op == "get_attr":
            value = getattr(graph, node.target)
            names[node] = f"{name}_table{len(tables)}" if value.dim() else _literal(value.item(), value.dtype)
            if value.dim():
                tables.append(_table(names[node], value))
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            for i, result in enumerate(results):
                arguments.append(f"{_type(result)}& y{i}")
                lines.append(f"  y{i} = {names[result]};")
        elif _name(node) in _SAME:
            names[node] = names[node.args[0]]
        else:
            names[node] = f"t{len(lines)}"
            lines.append(f"  const {_type(node)} {names[node]} = {_expression(node, names)};")
    return "\n".join([*tables, f"INLINE void {name}({', '.join(arguments)}) {{", *lines, "}\n"])


def _name(node: Any) -> str:
    return str(node.target._schema.name).removeprefix("aten::")


def _dtype(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _type(node: Any) -> str:
    return _TYPES.get(_dtype(node), "vi")


def _expression(node: Any, names: Mapping[Any, str]) -> str:
    """One operator."""
    kind, dtype = _name(node), _dtype(node)
    if node.kwargs.get("alpha", 1) != 1:
        raise NotElementwise(f"{node.target} with alpha has no line of C++")
    if kind == "index":
        table, (index,) = node.args
        return f"look_up<{table.meta['val'].numel()}>({names[table]}, {names[index]})"
    if kind in ("__and__", "bitwise_and") and (word := _unsigned_shift(node)):
        return f"shifted({names[word[0]]}, {word[1]})"
    values = [a for a in node.args if isinstance(a, torch.fx.Node) and _dtype(a) != torch.bool]
    wide = next((d for d in map(_dtype, values) if d.is_floating_point), _dtype(values[0]) if values else dtype)

    def text(a: Any) -> str:
        return names[a] if isinstance(a, torch.fx.Node) else _literal(a, wide)

    if kind == "clamp":
        x, low, high = (*node.args, None)[:3]
        found = text(x) if low is None else f"at_least({text(x)}, {text(low)})"
        return found if high is None else f"at_most({found}, {text(high)})"
    given = [text(a) for a in node.args if not isinstance(a, torch.dtype)]
    if kind == "_to_copy":
        return _converted(given[0], _dtype(node.args[0]), dtype)
    if kind == "view" and node.target._overloadname == "dtype":
        return f"({_type(node)}){given[0]}"
    if kind in _INFIX and len(given) == 2:
        a, b = reversed(given) if kind == "rsub" else given
        kind = "bitwise_and" if kind == "mul" and dtype == torch.bool else kind
        return f"(vi)({a} {_INFIX[kind]} {b})" if dtype == torch.bool else f"{a} {_INFIX[kind]} {b}"
    if kind not in _FORMS:
        raise NotElementwise(f"{node.target} has no line of C++")
    return _FORMS[kind].format(*given)


def _unsigned_shift(node: Any) -> tuple[Any, int] | None:
    """(x, n) of `x >> n & mask`, where the mask has the bits that n leaves: all else would be copies of the sign."""
    shift, mask = node.args
    if getattr(shift, "op", "") != "call_function" or _name(shift) != "__rshift__":
        return None
    x, n = shift.args
    return (x, n) if isinstance(n, int) and mask == (1 << 32 - n) - 1 else None


def _converted(x: str, given: torch.dtype, wanted: torch.dtype) -> str:
    if given == torch.bool:
        x = f"(-{x})"
    if wanted == torch.bfloat16:
        return f"to_bf16({x})"
    if given.is_floating_point != wanted.is_floating_point:
        x = f"__builtin_convertvector({x}, {_TYPES.get(wanted, 'vi')})"
    return f"({x} & 255)" if wanted == torch.uint8 else x


def _literal(number: float, dtype: torch.dtype, each: bool = True) -> str:
    """A number in all lanes, or as it is."""
    if not dtype.is_floating_point:
        text = f"(int32_t){(int(number) + 2**31) % 2**32 - 2**31}"
    elif math.isfinite(number):
        text = f"{struct.unpack('f', struct.pack('f', number))[0].hex()}f"
    else:
        text = "NAN" if math.isnan(number) else "INFINITY" if number > 0 else "-INFINITY"
    return f"same({text})" if each else text


def _table(name: str, values: Tensor) -> str:
    """An array, of whole vectors."""
    kind = "float" if values.dtype.is_floating_point else "int32_t"
    numbers = values.tolist() + [0] * (-len(values) % 16)
    text = ", ".join(_literal(v, values.dtype, each=False) for v in numbers)
    return f"alignas(64) static const {kind} {name}[] = {{{text}}};"
