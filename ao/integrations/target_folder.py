"""A folder that is there whole or not at all.

It is made beside its place and renamed at the end. What a killed run leaves behind, `.<name>.<32 hex digits>.tmp`, the next
run that succeeds removes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill with files, which is flushed to disk and becomes `target` when the context ends without an error.

    Raises FileExistsError if `target` is there.
    """
    check_absent(target)
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    part = parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    part.mkdir()
    try:
        yield part
        for path in part.rglob("*"):
            if path.is_dir():
                _flush_folder(path)
            else:
                _flush(path)
        _flush_folder(part)
        os.rename(part, target)
        _flush_folder(parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for left in parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.tmp", left.name):
            shutil.rmtree(left, ignore_errors=True)


def check_absent(target: Path) -> None:
    """Raise FileExistsError if `target` is there."""
    if target.exists():
        raise FileExistsError(f"{target} exists already; give a folder that does not, or remove it")


def _flush(path: Path) -> None:
    path.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
            os.fsync(folder)
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
