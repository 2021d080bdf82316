"""How the kernels read scales and zero points that may share a word (ao/dtypes/joint.py): by its dtype, int16, they know one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_number(scale):
    """Scales as they are stored -> float32."""
    if scale.dtype == tl.int16:
        return ((scale.to(tl.int32) & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def zero_number(zero, BITS: tl.constexpr):
    """Zero points of codes of so many bits as they are stored -> float32. A word has five bits of one: the sign and the last."""
    if zero.dtype == tl.int16:
        word = zero.to(tl.int32)
        return ((word & 15) | ((word >> 11) & 16)).to(tl.float32) * 2.0 ** (BITS - 5)
    else:
        return zero.to(tl.float32)
