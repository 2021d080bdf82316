"""What the chip of a device can do. Asked at every product, so that the answers are kept: PyTorch takes microseconds."""

from __future__ import annotations

import functools

import torch


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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
