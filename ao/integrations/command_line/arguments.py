"""What is found out about arguments before any work begins: numbers, files to read and to write, folders, the device."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WrongArguments(ValueError):
    """An argument that cannot be meant; the program says so in one line and returns 2."""


@contextmanager
def before_the_work() -> Iterator[None]:
    """What fails inside was asked for wrongly: errors become `WrongArguments`."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise WrongArguments(str(error)) from error


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


count = at_least(1)


def check_readable(option: str, paths: Iterable[Path] | None) -> None:
    """Raise OSError for what is no file that can be read."""
    for path in paths or ():
        if path.is_dir():
            raise IsADirectoryError(f"{option} {path} is a folder; give a file")
        if not path.exists():
            raise FileNotFoundError(f"{option} {path} does not exist")
        with path.open("rb") as file:
            file.read(1)


def check_model(folder: Path, language: bool = False) -> None:
    """Raise OSError for what is no model folder, ValueError for a broken config or, if a language model is asked for, another."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}; give the folder of a Hugging Face model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = "vocab_size" in config or "vocab_size" in config.get("text_config", {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no config of a model: {error}") from error
    if language and not words:
        raise ValueError(f"{folder} is no language model: its config.json has no vocab_size")


def check_writable(option: str, path: Path | None) -> None:
    """Raise OSError where no file or folder `path` can be made. A file that is there may be replaced."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OSError(f"{option} {path} is no ordinary file; give another name")
    parent = next(p for p in path.absolute().parents if p.exists())
    try:
        # Tried rather than asked: what permissions say does not hold for root, nor on every file system.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written: {parent}: {error.strerror or error}") from error


def check_device(name: str) -> Any:
    """The torch.device of that name. Raises ValueError for one that this machine does not have."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--device {name} is not there: {reason}") from error
    if device.type == "meta":
        raise ValueError(f"--device {name} computes nothing; give cpu, cuda or another that does")
    return device
