"""Several ranks of one test, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint"]


def spawn(
    worker: Callable[..., None], world: int, *args: Any, backend: str | None = "gloo", **environment: str
) -> None:
    """Run `worker(rank, *args)` on `world` ranks, with one thread each, and raise what one of them raises.

    backend: of the process group that a worker finds; None for a worker that makes its own.
    environment: variables beside MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # A process that has imported PyTorch, and has done nothing else, is where all ranks of all tests fork from.
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = (worker, world, port, backend, environment, args)
    mp.start_processes(_run, given, nprocs=world, start_method="forkserver")


def _run(
    rank: int,
    worker: Callable[..., None],
    world: int,
    port: int,
    backend: str | None,
    environment: dict[str, str],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **environment)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if backend is not None:
        dist.init_process_group(backend, rank=rank, world_size=world)
    worker(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    # A thread of gloo's frees the tensors of a collective after it told us that it is done, and needs the interpreter for it.
    # Where that is ending, Python 3.11 ends the thread by unwinding it, which C++ answers with abort(). Neither waiting for all
    # work nor destroy_process_group ends these threads: the caches of DTensor hold the mesh, and with it the group. So the
    # interpreter does not end; the process does.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
