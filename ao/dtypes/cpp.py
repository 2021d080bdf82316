"""C++ that is compiled when it is first needed, with g++ or clang++, and kept on disk for later processes.

Not by way of Inductor: what it compiles takes the headers of PyTorch, and a second becomes ten.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .caching import cache_directory

INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
}
"""Flags by PyTorch's names of what it uses of a CPU."""


CPP_TYPES = r"""
#include <stdint.h>
#include <string.h>

// Lanes of a vector.
#if !defined(W)
#if defined(__AVX512F__)
#define W 16
#else
#define W 8
#endif
#endif

typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE T load(const void* p) { T t; memcpy(&t, p, sizeof(T)); return t; }
INLINE vf same(float f) { return f - vf{}; }
"""
"""What all of the C++ begins with: vectors of GCC and Clang, of W lanes."""

CPP_LANES = (
    r"""
#if defined(__AVX2__)
#include <immintrin.h>
#endif
"""
    + CPP_TYPES
)
"""The same where instructions are named, whose header takes a compiler 0.4 seconds."""


@functools.cache
def cpp_compiler() -> str | None:
    """The C++ compiler: $CXX, or else g++ or clang++; None where there is none that the code was written for."""
    if not sys.platform.startswith("linux"):
        return None
    given = os.environ.get("CXX")
    return next((path for name in ([given] if given else ["g++", "clang++"]) if (path := shutil.which(name))), None)


def cpp_instructions() -> tuple[str, ...]:
    """The compiler flags for what PyTorch uses of this CPU."""
    return INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())


def cpp_library(source: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """`source`, compiled with `flags`, now if no process has done so; None where that fails."""
    tool = cpp_compiler()
    if tool is None:
        return None
    flags = ("-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-fopenmp", *flags)
    name = hashlib.sha256(repr((source, flags, os.uname().machine, tool)).encode()).hexdigest()[:32]
    path = cache_directory() / "kernels" / f"{name}.so"
    try:
        if not path.exists():
            _compile(tool, source, flags, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(tool: str, source: str, flags: Sequence[str], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, compiled, linked = (Path(folder) / f"made.{end}" for end in ("cpp", "o", "so"))
        text.write_text(source, encoding="utf-8")
        # Linked without OpenMP, whose functions are then those that PyTorch has loaded: two of its runtimes would keep twice as
        # many threads as there are cores.
        for command in (
            [tool, *flags, "-c", str(text), "-o", str(compiled)],
            [tool, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True)
        os.replace(linked, path)  # whole, whoever else writes it
