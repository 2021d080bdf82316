"""The processes that `spawn` runs."""

from __future__ import annotations

import threading
import time

import torch
import torch.distributed as dist
from ranks import spawn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

HELD: list[DeviceMesh] = []


def end_under_gloo(rank: int) -> None:
    """Return while a thread of gloo's is at work and will need the interpreter; a mesh that lives on keeps the thread."""
    HELD.append(init_device_mesh("cpu", (2,)))
    if rank == 1:
        time.sleep(0.2)  # so that rank 0 adds its callback before the collective is done: gloo's thread runs it
    started = threading.Event()
    work = dist.all_reduce(torch.ones(4), async_op=True)
    work.get_future().then(lambda _: (started.set(), time.sleep(1)))
    started.wait()


def test_a_rank_ends_while_gloo_needs_the_interpreter():
    spawn(end_under_gloo, 2)
