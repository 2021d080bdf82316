"""Launching a Triton kernel whose compiled form is at hand.

`kernel[grid](...)` looks at every argument anew and takes some 50 microseconds, longer than a product of a few tokens. Here
the compiled kernel is kept by what it depends on, and called with addresses: the launcher takes a number as it is, and asks
the driver about a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], *args: Any, num_warps: int = 4, early: bool = False,
    **constants: Any,
) -> None:  # fmt: skip
    """Launch `kernel` on the current stream of the current device, which is that of its arguments.

    args: tensors, tensor descriptors and integers, in the order of the kernel's parameters.
    constants: its `constexpr` parameters, which come after those, in their order.
    early: whether it may start before the kernel before it is done (programmatic dependent launch).
    """
    kinds: list[Any] = []
    given: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            kinds.append((arg.dtype, address & 15 == 0))
            given.append(address)
        elif isinstance(arg, int):
            kinds.append((arg == 1, arg & 15 == 0, arg < 2**31))
            given.append(arg)
        else:
            kinds.append((arg.base.dtype, *arg.block_shape))
            given.append(arg)
    device = torch.cuda.current_device()
    key = (kernel, device, num_warps, early, *constants.values(), *kinds)
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = _compiled(kernel, grid, args, num_warps, early, constants)
    else:
        _run(compiled, grid, device, given, constants.values())


class Launch:
    """`launch` of one kernel over one grid, for arguments that differ in their addresses alone.

    It is for the products of a few tokens in eager mode, where every microsecond counts: nothing is looked up.
    """

    def __init__(
        self, kernel: triton.JITFunction[Any], grid: tuple[int, ...], num_warps: int = 4,
        views: Mapping[int, torch.dtype] | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        """views: the dtypes as which the kernel reads some of its arguments, by position."""
        self.kernel, self.grid, self.num_warps, self.constants = kernel, grid, num_warps, constants
        self.views = views or {}
        self.compiled: Any = None
        self.block = (*grid, 1, 1)[:3]
        self.last = tuple(constants.values())

    def __call__(self, device: int, *args: Any) -> None:
        """Tensors on `device`, the current one, and integers, in the order of the kernel's parameters."""
        bits = 0
        given: list[Any] = []
        for arg in args:
            if arg.__class__ is int:
                given.append(arg)
            else:
                address = arg.data_ptr()
                bits |= address
                given.append(address)
        compiled = self.compiled
        if compiled is None or bits & 15:  # it is made for addresses that are multiples of 16
            self._first(bits, [a.view(self.views[i]) if i in self.views else a for i, a in enumerate(args)])
            return
        x, y, z = self.block
        compiled.run(
            x, y, z, torch._C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *given, *self.last,
        )  # fmt: skip

    def _first(self, bits: int, args: Sequence[Any]) -> None:
        if bits & 15:
            launch(self.kernel, self.grid, *args, num_warps=self.num_warps, **self.constants)
        else:
            self.compiled = _compiled(self.kernel, self.grid, args, self.num_warps, False, self.constants)


def _compiled(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], args: Sequence[Any], num_warps: int, early: bool,
    constants: dict[str, Any],
) -> Any:  # fmt: skip
    """Launch by Triton's own way, which gives the compiled kernel."""
    assert kernel.arg_names == [*kernel.arg_names[: len(args)], *constants]
    more = {"launch_pdl": True} if early else {}  # an option that GPUs before Hopper do not have
    return kernel[grid](*args, num_warps=num_warps, **constants, **more)


def _run(compiled: Any, grid: tuple[int, ...], device: int, given: Sequence[Any], constants: Any) -> None:
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    # No launch metadata and no hooks: they are for Triton's own profiler.
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *constants)


_DESCRIPTORS: dict[tuple[Any, ...], TensorDescriptor] = {}


def tile_reader(t: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """The descriptor by which the copy engine reads tiles of `block` from a contiguous matrix.

    Making one takes longer than a launch, so one per form is kept and copied with another address.
    """
    key = (t.dtype, t.shape, *block)
    form = _DESCRIPTORS.get(key)
    if form is None:
        if len(_DESCRIPTORS) > 4096:
            _DESCRIPTORS.clear()
        form = _DESCRIPTORS[key] = TensorDescriptor.from_tensor(torch.empty_like(t, device="meta"), list(block))
    other = copy.copy(form)  # the form itself holds no memory
    other.base = t
    return other


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is for kernels too, and takes a microsecond.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << (n - 1).bit_length()
