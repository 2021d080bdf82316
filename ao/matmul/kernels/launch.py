"""Launching a Triton kernel whose compiled form is at hand.

`kernel[grid](...)` looks at every argument anew and takes some 50 microseconds, longer than a product of a few tokens. Here
the compiled kernel is kept by what it depends on, and called with addresses: the launcher takes a number as it is, and asks
the driver about a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], *args: Any, num_warps: int = 4, early: bool = False,
    registers: int | None = None, **constants: Any,
) -> None:  # fmt: skip
    """Launch `kernel` on the current stream of the current device, which is that of its arguments.

    args: tensors, tensor descriptors and integers, in the order of the kernel's parameters.
    constants: its `constexpr` parameters, which come after those, in their order.
    early: whether it may start before the kernel before it is done (programmatic dependent launch).
    registers: of a thread, at most.
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
    key = (kernel, device, num_warps, early, registers, *constants.values(), *kinds)
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = _compiled(kernel, grid, args, num_warps, early, constants, registers)
    else:
        _run(compiled, (*grid, 1, 1)[:3], device, given, constants.values())


class Launch:
    """`launch` of one kernel over one grid, for arguments that differ in their addresses alone.

    It is for products in eager mode, where every microsecond counts: nothing is looked up.
    """

    def __init__(
        self, kernel: triton.JITFunction[Any], grid: tuple[int, ...], num_warps: int = 4, early: bool = False,
        views: Mapping[int, torch.dtype] | None = None, registers: int | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        """views: the dtypes as which the kernel reads some of its arguments, by position."""
        self.kernel, self.num_warps, self.early, self.constants = kernel, num_warps, early, constants
        self.registers = registers
        self.grid = (*grid, 1, 1)[:3]
        self.views = views or {}
        self.last = tuple(constants.values())
        self.compiled: Any = None

    def __call__(self, device: int, *args: Any) -> None:
        """Tensors on `device`, the current one, tensor descriptors and integers, in the order of the kernel's parameters."""
        bits = 0
        given: list[Any] = []
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                bits |= address
                given.append(address)
            else:
                given.append(arg)
        compiled = self.compiled
        if compiled is None or bits & 15:  # it is made for addresses that are multiples of 16
            self._first(bits, [_viewed(arg, self.views.get(i)) for i, arg in enumerate(args)])
            return
        _run(compiled, self.grid, device, given, self.last)

    def _first(self, bits: int, args: Sequence[Any]) -> None:
        if bits & 15:
            launch(
                self.kernel, self.grid, *args, num_warps=self.num_warps, early=self.early, registers=self.registers,
                **self.constants,
            )  # fmt: skip
        else:
            self.compiled = _compiled(
                self.kernel, self.grid, args, self.num_warps, self.early, self.constants, self.registers
            )


def _viewed(arg: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return arg
    return arg.view(dtype) if isinstance(arg, Tensor) else _with_base(arg, arg.base.view(dtype))


def _compiled(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], args: Sequence[Any], num_warps: int, early: bool,
    constants: dict[str, Any], registers: int | None = None,
) -> Any:  # fmt: skip
    """Launch by Triton's own way, which gives the compiled kernel."""
    assert kernel.arg_names == [*kernel.arg_names[: len(args)], *constants]
    more: dict[str, Any] = {"launch_pdl": True} if early else {}  # an option that GPUs before Hopper do not have
    more |= {} if registers is None else {"maxnreg": registers}
    return kernel[grid](*args, num_warps=num_warps, **constants, **more)


def _run(compiled: Any, grid: tuple[int, ...], device: int, given: Sequence[Any], constants: Iterable[Any]) -> None:
    stream = torch._C._cuda_getCurrentRawStream(device)
    # No launch metadata and no hooks: they are for Triton's own profiler.
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *constants)


_READERS: dict[tuple[Any, ...], TensorDescriptor] = {}


def tile_reader(t: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> TensorDescriptor:
    """The descriptor by which the copy engine reads tiles of `block` from a contiguous matrix.

    Making one takes longer than a launch, so one per form is kept, and copied with another address.
    dtype: as which it is read. A kernel that is not compiled yet wants a view of that dtype for its base: `Launch.views`.
    """
    key = (t.dtype, t.shape, block, dtype)
    form = _READERS.get(key)
    if form is None:
        if len(_READERS) >= 4096:
            _READERS.clear()
        like = torch.empty_like(t, device="meta")  # the form itself holds no memory
        form = _READERS[key] = TensorDescriptor.from_tensor(like if dtype is None else like.view(dtype), list(block))
    return _with_base(form, t)


def _with_base(form: TensorDescriptor, base: Tensor) -> TensorDescriptor:
    other = object.__new__(TensorDescriptor)
    other.__dict__.update(form.__dict__)
    other.base = base
    return other


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is for kernels too, and takes a microsecond.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << (n - 1).bit_length()
