"""How the benchmarks measure: what the machine can do at most, calls in turns, and the facts that go with a number."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tables import markdown
from torch import Tensor

from ao.matmul import has_float8
from ao.matmul.kernels.device import FLOATS

K = TypeVar("K", bound=Hashable)


def facts(device: torch.device) -> dict[str, Any]:
    """What a table of numbers has to say about its origin."""
    triton = importlib.util.find_spec("triton")
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else None,
        "date": datetime.date.today().isoformat(),
        "command": command(),
    }


def command() -> str:
    """The command line, without the folders that it was run from or pointed to."""
    words = [Path(sys.argv[0]).name, *(Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:])]
    return "scripts/" + shlex.join(words).replace("\n", "\\n")


def device_name(device: torch.device) -> str:
    """The name of the chip; for a CPU also its threads, and the units that matter here."""
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name())
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    chip = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    units = {
        "bfloat16": torch.bfloat16 in FLOATS,
        "int8 dot products": torch.cpu._is_vnni_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    has = ", ".join(unit for unit, there in units.items() if there) or "neither bfloat16 nor int8 units"
    threads = torch.get_num_threads()
    return f"{chip} ({has}), {threads} thread{'s' if threads > 1 else ''}"


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory. 32 MB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 2**32


def used_bytes(device: torch.device, peak: bool = False) -> int:
    """Bytes in use: by tensors on a GPU, by the process on a CPU. peak: the most since `reset_peak`. 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM" if peak else "VmRSS")), 0)


def reset_peak(device: torch.device) -> None:
    """Forget the peak, as far as the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def least_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The shortest of `repeats` calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = clock(device)()
        call()
        synchronize(device)
        times.append(clock(device)() - start)
    return min(times)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds; of the thread alone where it is the only one, whoever else runs on the machine."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def ceilings(device: torch.device) -> dict[str, float]:
    """What the machine can do at most, as far as PyTorch's own operators show it.

    copy, read: bytes per second of a copy (read and written) and of a sum. float, int8, float8: operations per second of a
    large product of bfloat16 or float32 (the faster of them), int8 and float8 matrices; int8 and float8 are missing where
    there is no such product, and are no lower than float, in which the same product can be computed.
    """
    gpu = device.type != "cpu"
    repeats = 20 if gpu else 5
    source = torch.ones(2**28 if gpu else 2**26, dtype=torch.float32, device=device)  # 1 GiB or 256 MiB
    target = torch.empty_like(source)
    found = {
        "copy": 2 * source.nbytes / least_seconds(partial(target.copy_, source), device, repeats),
        "read": source.nbytes / least_seconds(source.sum, device, repeats),
    }
    size = 8192 if gpu else 1024
    a, b = torch.randn(2, size, size, device=device).unbind()

    def rate(product: Callable[..., Tensor], *operands: Any, **more: Any) -> float:
        return 2 * size**3 / least_seconds(partial(product, *operands, **more), device, repeats)

    kinds = [torch.bfloat16] if gpu else [torch.bfloat16, torch.float32]
    found["float"] = max(rate(torch.mm, a.to(dtype), b.to(dtype)) for dtype in kinds)
    x, y = ((t * 30).round().clamp(-127, 127).to(torch.int8) for t in (a, b))
    found["int8"] = max(found["float"], rate(torch._int_mm, x, y.t()))
    if has_float8(device):
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        found["float8"] = max(found["float"], rate(torch._scaled_mm, x, y.t(), one, one, out_dtype=torch.bfloat16))
    return found


def bandwidth(ceiling: Mapping[str, float]) -> float:
    """Bytes per second: the better of a copy and a sum."""
    return max(ceiling["copy"], ceiling["read"])


class Calls:
    """Calls that are made again at every replay, in place of a CUDA graph where none can be recorded."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = calls

    def replay(self) -> None:
        """Make them."""
        for call in self.calls:
            call()


def capture(calls: Sequence[Callable[[], object]], pool: Any) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all `calls`, one after the other. Each must have run before, since nothing may compile now."""
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                Calls(calls).replay()
            except Exception as error:
                first = error
                raise
    except Exception as error:
        raise first or error from None  # the end of a broken capture raises too, and says less
    return graph


def replays_in_turns(graphs: Mapping[K, torch.cuda.CUDAGraph | Calls], seconds: float = 0.02) -> dict[K, float]:
    """Median seconds of each graph, all in turns for about `seconds` each, at least five times.

    The replays are queued without a gap, so that what the host does is not in the numbers.
    """
    pairs: dict[K, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {key: [] for key in graphs}

    def turn() -> None:
        for key, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            pairs[key].append((start, end))

    turn()
    turn()
    torch.cuda.synchronize()
    longest = max(each[-1][0].elapsed_time(each[-1][1]) for each in pairs.values()) / 1e3
    for each in pairs.values():
        each.clear()
    for _ in range(min(max(5, round(seconds / longest)), 25)):
        turn()
    torch.cuda.synchronize()
    return {key: statistics.median(a.elapsed_time(b) for a, b in each) / 1e3 for key, each in pairs.items()}


def calls_in_turns(
    calls: Mapping[K, Callable[[], object]], device: torch.device, seconds: float = 2.0, least: int = 5
) -> dict[K, float]:
    """Median seconds of each call, all in turns for about `seconds` together, `least` to 100 times."""
    times: dict[K, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn >= least and (turn >= 100 or time.perf_counter() > end):
            break
        for key, call in calls.items():
            synchronize(device)
            start = clock(device)()
            call()
            synchronize(device)
            times[key].append(clock(device)() - start)
    return {key: statistics.median(each) for key, each in times.items()}


def own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of `function` that the compiler takes for another one, so that its graphs are counted and limited apart."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{''.join(c if c.isalnum() else '_' for c in name)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def start_compiler(device: torch.device) -> None:
    """Compile something small, so that what the first compilation of a process costs is not in the next one's time."""
    torch.compile(own_code(_smallest, "start"))(torch.ones(64, 64, device=device))
    synchronize(device)


def _smallest(x: Tensor) -> Tensor:
    return (x * 2).sum(-1)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write so that a process which is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def show(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: by rich on a terminal that has it, else as aligned text that is also Markdown."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    if title:
        print(f"\n{title}\n")
    print(markdown(list(head), [list(row) for row in rows]), flush=True)
