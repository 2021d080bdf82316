"""Launching a Triton kernel whose compiled form is at hand.

`kernel[grid](...)` looks at every argument anew and takes some 50 microseconds, longer than a product of a few tokens. Here
the compiled kernel is kept by what it depends on, and called with the arguments as they are.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], *args: Any, num_warps: int = 4, early: bool = False,
    **constants: Any,
) -> None:  # fmt: skip
    """Launch `kernel` on the current stream of the device of its first argument, which is the current device.

    args: tensors, tensor descriptors and integers, in the order of the kernel's parameters.
    constants: its `constexpr` parameters, which come after those, in their order.
    early: whether it may start before the kernel before it is done (programmatic dependent launch).
    """
    key = (kernel, num_warps, early, *constants.values(), *map(_kind, args))
    compiled = _COMPILED.get(key)
    if compiled is None:
        assert kernel.arg_names == [*kernel.arg_names[: len(args)], *constants]
        more = {"launch_pdl": True} if early else {}  # an option that GPUs before Hopper do not have
        _COMPILED[key] = kernel[grid](*args, num_warps=num_warps, **constants, **more)
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *constants.values())


def _kind(arg: Any) -> Any:
    """What Triton makes a kernel for: the type of an argument, and whether it is a multiple of 16, or 1."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.device.index, arg.data_ptr() % 16 == 0
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, arg.base.device.index, tuple(arg.block_shape)
    return arg == 1, arg % 16 == 0, arg < 2**31


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is for kernels too, and takes a microsecond.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << (n - 1).bit_length()
