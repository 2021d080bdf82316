"""A linear layer over DTensors: what its shards compute, and how the results and gradients are placed.

One rule per mesh dim, from how the input x (..., K) and the weight w (N, K) are placed there:

    x            w            out          grad_x       grad_w
    Replicate    Replicate    Replicate    Replicate    Replicate
    Replicate    Shard(0)     Shard(-1)    Partial      Shard(0)      columns of the output: ColwiseParallel
    Shard(-1)    Shard(1)     Partial      Shard(-1)    Shard(1)      parts of the sum: RowwiseParallel
    Shard(d)     Replicate    Shard(d)     Shard(d)     Partial       tokens
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ao.dtypes import QTensor


def is_dtensor(t: Any) -> bool:
    """Whether `t` is a DTensor. Importing them takes long, and nobody has one without."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def on_shards(linear: Callable[..., Tensor], x: Any, w: Any, bias: Any, *args: Any) -> Tensor:
    """`linear(x, w, bias, *args)` on the local shards, as a DTensor. What is no DTensor counts as replicated.

    An input that is quantized (tensor_parallel.py gathered it) is local; what comes back to it is each rank's part of a sum.
    Any other input that fits no rule is redistributed: to Shard(-1) if the weight is Shard(1), else to Replicate.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = (w if is_dtensor(w) else x).device_mesh
    replicated = [Replicate()] * mesh.ndim
    if isinstance(x, QTensor):
        if not all(p.is_shard(0) for p in w.placements):
            raise ValueError(f"linear: a gathered input needs a weight placed Shard(0), got {w.placements}")
        result = linear(x, w.to_local(), None, *args)
        made = DTensor.from_local(result, mesh, [Shard(x.dim() - 1)] * mesh.ndim, run_check=False)
        return made if bias is None else made + bias.to(made.dtype)
    x, w = (t if is_dtensor(t) else DTensor.from_local(t, mesh, replicated, run_check=False) for t in (x, w))
    last = x.dim() - 1
    rules: list[tuple[Any, Any, Any, Any]] = []
    for px, pw in zip(x.placements, w.placements):
        if pw.is_shard(0):
            rules.append((Replicate(), Shard(last), Partial(), pw))
        elif pw.is_shard(1):
            rules.append((Shard(last), Partial(), Shard(last), pw))
        elif not pw.is_replicate():
            raise ValueError(f"linear: a weight placed {w.placements} has no meaning here; redistribute it first")
        elif px.is_shard() and px.dim % x.dim() != last:
            rules.append((px, px, px, Partial()))
        else:
            rules.append((Replicate(), Replicate(), Replicate(), pw))
    wanted, out, grad_x, grad_w = zip(*rules)
    x = x.redistribute(placements=wanted)
    result = linear(x.to_local(grad_placements=grad_x), w.to_local(grad_placements=grad_w), None, *args)
    made = DTensor.from_local(result, mesh, out, run_check=False)
    return made if bias is None else made + bias.to(made.dtype)
