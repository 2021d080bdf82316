"""Timings on disk, so that no product is measured twice on one machine by one version."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...dtypes import sources_digest
from ..atomic_write import atomic_write
from ..compiled import Compiler
from .timing import Product


class TimingCache:
    """Seconds, or why there are none, by product and label of the weight.

    directory: where its file lies; None keeps nothing. The file's name stands for all that a timing depends on beside the
    product: versions of torch, Triton and Python, the sources of `ao`, eager or compiled and how, and threads. A file that cannot
    be read counts as empty.
    """

    def __init__(self, directory: Path | None, compiler: Compiler) -> None:
        settings = {**_environment(), "compiler": compiler.key}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
        keeps = directory is not None and compiler.key is not None
        self.path = directory / f"autoquant-{digest}.json" if directory and keeps else None
        self._settings = settings
        self._entries = self._read()

    def get(self, key: str, labels: Iterable[str]) -> dict[str, float | str] | None:
        """The timings of a product, if all labels are known: only what was measured together can be compared."""
        entry = self._entries.get(key, {})
        return {label: entry[label] for label in labels} if all(label in entry for label in labels) else None

    def put(self, key: str, timings: dict[str, float | str]) -> None:
        """Keep the timings of a product, and write the file. Raises OSError when it cannot be written."""
        self._entries[key] = timings
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._entries = {**self._read(), **self._entries}  # with what another process may have written
            text = json.dumps({"settings": self._settings, "seconds": self._entries}, indent=1)
            atomic_write(self.path, text)

    def _read(self) -> dict[str, dict[str, float | str]]:
        try:
            assert self.path is not None
            entries = json.loads(self.path.read_text(encoding="utf-8"))["seconds"]
            return {
                key: {label: t for label, t in entry.items() if isinstance(t, (int, float, str))}
                for key, entry in entries.items()
            }
        except (AssertionError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def product_key(product: Product, model_bytes: int) -> str:
    """A product as text, with the device's name, and the bytes of the model to two binary digits."""
    shape = f"{product.tokens} x {product.out_features} x {product.in_features}"
    floats = f"{product.dtype} by {product.weight_dtype}, autocast {product.autocast}".replace("torch.", "")
    digits = max(0, model_bytes.bit_length() - 2)
    more = f"sharing {product.sharing}, after {product.after or 'nothing'}, model {model_bytes >> digits << digits}"
    return f"{device_name(product.device)}, {shape}, {floats}, bias {product.bias}, {more}"


@functools.cache
def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "ao": sources_digest(),
        "benchmark": hashlib.blake2b(Path(__file__).with_name("timing.py").read_bytes(), digest_size=8).hexdigest(),
        "float32": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
