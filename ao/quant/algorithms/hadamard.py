"""Hadamard matrices: orthogonal, with entries +-1 / sqrt(n), so that they spread a large number evenly over n."""

from __future__ import annotations

import torch
from torch import Tensor


def random_hadamard(n: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix (n, n), float64: a Hadamard matrix with random signs of its rows, H = diag(s) H_n / sqrt(n).

    H_n is that of Sylvester for the power of 2 in n, times one of Paley's for the rest. Where neither is known for n, an
    orthogonal matrix drawn at random, which spreads nearly as evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    rest = n
    while rest % 2 == 0 and paley(rest) is None:
        rest //= 2
    core = torch.ones(1, 1, dtype=torch.float64, device="cpu") if rest == 1 else paley(rest)
    if core is None:
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))
        return q * r.diagonal().sign()
    while core.shape[0] < n:
        core = torch.cat([torch.cat([core, core], 1), torch.cat([core, -core], 1)])
    signs = torch.randint(0, 2, (n, 1), generator=generator, device="cpu").double() * 2 - 1
    return signs * core / n**0.5


def paley(n: int) -> Tensor | None:
    """A Hadamard matrix of order n, entries +-1, from the quadratic residues of a prime p, or None where there is none.

    n = p + 1 with p = 3 mod 4, or n = 2 (p + 1) with p = 1 mod 4 (Paley, On orthogonal matrices, 1933).
    """
    if n % 4:
        return None
    if _is_prime(n - 1):
        p = n - 1
        skew = _bordered(p)
        skew[1:, 0] = -1
        return skew + torch.eye(n, dtype=torch.float64, device="cpu")
    p = n // 2 - 1
    if p % 4 == 1 and _is_prime(p):
        symmetric = _bordered(p)
        a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
        b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
        return torch.kron(symmetric, a) + torch.kron(torch.eye(p + 1, dtype=torch.float64, device="cpu"), b)
    return None


def _bordered(p: int) -> Tensor:
    """The matrix of chi(i - j), with a row and a column of ones before it and 0 in the corner. (p + 1, p + 1)."""
    residues = {i * i % p for i in range(1, p)}
    chi = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, p)], dtype=torch.float64, device="cpu")
    index = torch.arange(p, device="cpu")
    made = torch.ones(p + 1, p + 1, dtype=torch.float64, device="cpu")
    made[0, 0] = 0
    made[1:, 1:] = chi[(index[:, None] - index) % p]
    return made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
