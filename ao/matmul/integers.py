"""The product of two int8 matrices on whatever has integer units, by `torch._int_mm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.tracing import known
from .kernels.device import VNNI


def enough_rows(x: Tensor) -> Tensor:
    """`x` (M, K) as `torch._int_mm` takes it: on a GPU with rows of zeros after it, since there it wants more than 16. On a CPU a
    single row gets the stride K, since with that of a transposed column, 1, it is read wrongly (PyTorch 2.13)."""
    m = x.shape[0]
    if x.device.type != "cuda" and known(m == 1) and x.stride(0) != x.shape[1]:
        return x.flatten().view(1, -1)
    if x.device.type != "cuda" or known(m > 16):
        return x
    return F.pad(x, (0, 0, 0, 32 - m if known(m <= 16) else 17))


def takes(device: torch.device, n: int, k: int) -> bool:
    """Whether `torch._int_mm` multiplies by a matrix (n, k) there, fast: on CUDA both are multiples of 8.

    On a CPU it is wrong for k = 1: it reads memory that is not the matrix's (PyTorch 2.13).
    """
    return (device.type == "cuda" and n % 8 == 0 and k % 8 == 0) or (device.type == "cpu" and VNNI and k > 1)


def integer_product(x: Tensor, q: Tensor) -> Tensor:
    """x @ q.T, exact: int32, or float32 where `torch._int_mm` is slow or does not take the shapes, up to 2**24.

    x: (M, K) int8, q: (N, K) int8 -> (M, N).
    """
    if takes(x.device, q.shape[0], q.shape[1]) and known(x.shape[0] > 0, True):
        return torch._int_mm(enough_rows(x), q.t())[: x.shape[0]]
    return x.float() @ q.float().t()
