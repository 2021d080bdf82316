"""Launching a Triton kernel whose compiled form is at hand.

`kernel[grid](...)` looks at every argument anew and takes some 50 microseconds, longer than a product of a few tokens. Here
the compiled kernel is kept by what it depends on, and called with addresses: the launcher takes a number as it is, and asks
the driver about a tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_STARTS: dict[tuple[Any, ...], _Start] = {}


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
    described: list[int] = []
    for i, arg in enumerate(args):
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
            described.append(i)
    device = torch.cuda.current_device()
    key = (kernel, device, num_warps, early, registers, *constants.values(), *kinds)
    start = _STARTS.get(key)
    if start is None:
        compiled = _compiled(kernel, grid, args, num_warps, early, constants, registers)
        _STARTS[key] = _start_of(compiled, [{} if i in described else None for i in range(len(args))])
        return
    for i in reversed(described):
        given[i : i + 1] = start.encode(given[i], i)
    stream = torch._C._cuda_getCurrentRawStream(device)
    start.call(*(*grid, 1, 1)[:3], stream, *start.between, *given, *constants.values())


class Launch:
    """`launch` of one kernel over one grid, for arguments that differ in their addresses alone.

    It is for products in eager mode and the operators of graphs, where every microsecond counts: nothing is made anew.
    """

    def __init__(
        self, kernel: triton.JITFunction[Any], grid: tuple[int, ...], num_warps: int = 4, early: bool = False,
        views: Mapping[int, torch.dtype] | None = None, tiles: Mapping[int, tuple[int, int]] | None = None,
        registers: int | None = None, **constants: Any,
    ) -> None:  # fmt: skip
        """views: the dtypes as which the kernel reads some of its arguments, by position.
        tiles: the shapes of the tiles in which the copy engine reads or writes some of them, which are contiguous matrices.
        registers: as of `launch`."""
        self.kernel, self.num_warps, self.early, self.constants = kernel, num_warps, early, constants
        self.registers = registers
        self.grid = (*grid, 1, 1)[:3]
        self.views, self.tiles = views or {}, tiles or {}
        self.last = tuple(constants.values())
        self.made: dict[int, dict[Any, list[Any]]] = {i: {} for i in self.tiles}
        self.start: _Start | None = None

    def __call__(self, device: int, *args: Any) -> None:
        """Tensors on `device`, the current one, and integers, in the order of the kernel's parameters."""
        start = self.start
        if start is None:
            self._first(args)
            return
        bits = 0
        given: list[Any] = []
        for arg, made in zip(args, start.made):
            if not isinstance(arg, Tensor):
                given.append(arg)
                continue
            address = arg.data_ptr()
            bits |= address
            if made is None:
                given.append(address)
            else:
                key = address, arg.shape
                given += made[key] if key in made else self._make(made, key, arg)
        if bits & 15:  # it is made for addresses that are multiples of 16
            self._unaligned(args)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        start.call(*self.grid, stream, *start.between, *given, *self.last)

    def _first(self, args: Sequence[Any]) -> None:
        if any(isinstance(arg, Tensor) and arg.data_ptr() % 16 for arg in args):
            self._unaligned(args)
            return
        compiled = _compiled(
            self.kernel, self.grid, self._described(args), self.num_warps, self.early, self.constants, self.registers
        )  # fmt: skip
        self.start = _start_of(compiled, [self.made.get(i) for i in range(len(args))])

    def _unaligned(self, args: Sequence[Any]) -> None:
        launch(
            self.kernel, self.grid, *self._described(args), num_warps=self.num_warps, early=self.early,
            registers=self.registers, **self.constants,
        )  # fmt: skip

    def _described(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as Triton wants them where it compiles."""
        views = [arg if i not in self.views else arg.view(self.views[i]) for i, arg in enumerate(args)]
        tiles = self.tiles
        return [TensorDescriptor.from_tensor(arg, list(tiles[i])) if i in tiles else arg for i, arg in enumerate(views)]

    def _make(self, made: dict[Any, list[Any]], key: Any, arg: Tensor) -> list[Any]:
        """What a matrix is given as: it follows from its address and shape, and takes as long to make as a launch."""
        assert self.start is not None
        i = next(i for i, each in self.made.items() if each is made)
        viewed = arg if i not in self.views else arg.view(self.views[i])
        if len(made) >= 4096:
            made.clear()
        made[key] = found = self.start.encode(TensorDescriptor.from_tensor(viewed, list(self.tiles[i])), i)
        return found


class _Start(NamedTuple):
    """How a compiled kernel is started: `call` with the grid, the stream, `between`, and what the arguments are given as.

    made: by argument, what matrices that go by tiles are given as; None for other arguments.
    encode: what a descriptor is given as, of that argument.
    """

    call: Callable[..., None]
    between: tuple[Any, ...]
    made: list[dict[Any, list[Any]] | None]
    encode: Callable[[TensorDescriptor, int], list[Any]]


def _start_of(compiled: Any, made: list[dict[Any, list[Any]] | None]) -> _Start:
    """By the launcher of Triton 3.6 in C, past its Python code, which takes as long as all the rest; else by Triton's own way."""
    run, packed = compiled.run, compiled.packed_metadata
    # No launch metadata and no hooks: they are for Triton's own profiler.
    if not triton.__version__.startswith("3.6.") or run.global_scratch_size or run.profile_scratch_size:
        return _Start(run, (compiled.function, packed, None, None, None), made, lambda descriptor, i: [descriptor])
    from triton.backends.nvidia.driver import make_tensordesc_arg

    between = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, packed, None, None, None)
    call, metas = run.launch, [None]
    if call.__class__ is types.FunctionType:  # which encodes descriptors first
        held = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__ or ())))
        call, metas = held["launcher"], held["tensordesc_meta"]
    places = [i for i, each in enumerate(made) if each is not None]
    return _Start(call, between, made, lambda descriptor, i: make_tensordesc_arg(descriptor, metas[places.index(i)]))


def _compiled(
    kernel: triton.JITFunction[Any], grid: tuple[int, ...], args: Sequence[Any], num_warps: int, early: bool,
    constants: dict[str, Any], registers: int | None = None,
) -> Any:  # fmt: skip
    """Launch by Triton's own way, which gives the compiled kernel."""
    assert kernel.arg_names == [*kernel.arg_names[: len(args)], *constants]
    more: dict[str, Any] = {"launch_pdl": True} if early else {}  # an option that GPUs before Hopper do not have
    more |= {} if registers is None else {"maxnreg": registers}
    return kernel[grid](*args, num_warps=num_warps, **constants, **more)


_READERS: dict[tuple[Any, ...], TensorDescriptor] = {}


def tile_reader(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor by which the copy engine reads tiles of `block` from a contiguous matrix.

    Making one takes longer than a launch, so one per form is kept, and copied with another address.
    """
    key = (t.dtype, t.shape, block)
    form = _READERS.get(key)
    if form is None:
        if len(_READERS) >= 4096:
            _READERS.clear()
        like = torch.empty_like(t, device="meta")  # the form itself holds no memory
        form = _READERS[key] = TensorDescriptor.from_tensor(like, list(block))
    other = object.__new__(TensorDescriptor)
    other.__dict__.update(form.__dict__)
    other.base = t
    return other


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv is for kernels too, and takes a microsecond.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is no less than n."""
    return 1 << (n - 1).bit_length()
