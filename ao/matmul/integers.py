"""The product of two int8 matrices on whatever has integer units, by `torch._int_mm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.tracing import known
from .kernels.device import VNNI


def enough_rows(x: Tensor) -> Tensor:
    """`x` (M, K), and on a GPU rows of zeros after it, as `torch._int_mm` takes more than 16 rows there."""
    m = x.shape[0]
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
        return torch._int_mm(of_one_row(enough_rows(x)), q.t())[: x.shape[0]]
    return x.float() @ q.float().t()


def of_one_row(q: Tensor) -> Tensor:
    """`q`, (N, K), as the left operand of `torch._int_mm`, which on a CPU reads a single row wrongly unless its stride is K
    (PyTorch 2.13): that of a column which was transposed is 1."""
    return q.flatten().view(1, -1) if known(q.shape[0] == 1) and q.stride(0) != q.shape[1] else q
