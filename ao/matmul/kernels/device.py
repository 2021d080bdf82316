"""What the chip of a device can do. Asked at every product, so that the answers are kept: PyTorch takes microseconds."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

VNNI = torch.cpu._is_vnni_supported()
"""Whether the CPU multiplies int8 in integer units. Without, a sum is many times faster in float32, exact up to 2**24."""

_X86 = platform.machine() in ("x86_64", "AMD64")


def _floats() -> set[torch.dtype]:
    found = {torch.float32, torch.float64}
    if not torch.backends.mkldnn.is_available():
        return found
    # With AVX-512 oneDNN takes bfloat16 also where no unit multiplies it, at a quarter of float32's speed.
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() or not _X86
    if units and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return found


FLOATS = _floats()
"""The floating-point products that the CPU does in hardware."""


TILES = torch.cpu._is_amx_tile_supported() and torch.bfloat16 in FLOATS
"""Whether the CPU multiplies tiles of bfloat16 and of int8 (AMX)."""


def tile_instructions(flags: Sequence[str]) -> tuple[str, ...]:
    """The compiler flags for tiles, beside `flags` for the rest of the CPU; none where there are no tiles, or where the operating
    system, which is asked for them, does not give them."""
    if "-mavx512f" not in flags or not TILES or not torch.cpu._init_amx():
        return ()
    return "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"


_TRITON = find_spec("triton") is not None

_F = TypeVar("_F", bound=Callable[..., Any])


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, (9, 0) for Hopper; (0, 0) of any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    # Dynamo makes a constant of PyTorch's answer, and warns of a function that keeps its own.
    return torch.cuda.get_device_capability(device) if torch.compiler.is_compiling() else _capability(device)


def has_float8(device: torch.device) -> bool:
    """Whether the chip multiplies float8: NVIDIA's since Ada and Hopper."""
    return cuda_capability(device) >= (8, 9)


def is_hopper(device: torch.device) -> bool:
    """Whether it has the tensor cores and the copy engine that hopper.py is for."""
    return cuda_capability(device)[0] == 9


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run: on NVIDIA's GPUs since Ampere. Those of float8 want `has_float8` too."""
    return _TRITON and cuda_capability(device) >= (8, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_its_device(function: _F) -> _F:
    """`function` of a tensor and whatever else, while the tensor's GPU is the current one, on which Triton launches."""
    current = getattr(torch._C, "_cuda_getDevice", None)  # a build for CPUs has none, and does not call this

    @functools.wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        if x.device.index == current():  # type: ignore[misc]
            return function(x, *args)
        with torch.cuda.device(x.device):
            return function(x, *args)

    return run  # type: ignore[return-value]
