"""What is found out about arguments before any work begins: numbers, files to read and to write, folders, the device."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from .safetensors_header import read_header


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


def decibels(text: str) -> float:
    """A type for argparse: a number that is finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number of dB such as 25, got {text!r}")
    return number


def check_readable(option: str, paths: Iterable[Path] | None) -> None:
    """Raise OSError for what is no file that can be read."""
    for path in paths or ():
        if path.is_dir():
            raise IsADirectoryError(f"{option} {path} is a folder; give a file")
        if not path.exists():
            raise FileNotFoundError(f"{option} {path} does not exist")
        with path.open("rb") as file:
            file.read(1)


def check_model(folder: Path, language: bool = False) -> dict[str, Any]:
    """The config.json of a model folder. Raises OSError for what is no model folder, ValueError for a broken config or, if a
    language model is asked for, which takes one text at a time, another."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        how = "give the folder of a Hugging Face model"
        name = re.fullmatch(r"(?:https?:/+(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+)", folder.as_posix())
        if not folder.exists() and name:
            how = f"if it is a name on the hub, download it first: hf download {name[1]} --local-dir DIR"
        raise FileNotFoundError(f"{folder} {what}; {how}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        words = "vocab_size" in config or "vocab_size" in config.get("text_config", {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is no config of a model: {error}") from error
    if language and not words:
        raise ValueError(f"{folder} is no language model: its config.json has no vocab_size")
    if language and config.get("is_encoder_decoder"):
        raise ValueError(f"{folder} is an encoder and a decoder, which take two texts; give a model that takes one")
    for file in folder.glob("*.safetensors"):
        read_header(file)
    return dict(config)


_OTHERS = re.compile(
    r"For(MaskedLM|PreTraining|QuestionAnswering|MultipleChoice|NextSentencePrediction|\w*Classification)$"
    r"|(?<!Head)(?<!Heads)Model$"
)
"""Names of transformers' classes that give no probabilities of the next token."""


def check_causal(option: str, folder: Path) -> None:
    """Raise ValueError for a model whose perplexity means nothing, since it does not tell the next token."""
    architectures = check_model(folder, language=True).get("architectures") or [""]
    if _OTHERS.search(str(architectures[0])):
        raise ValueError(
            f"{option} measures perplexity, and {folder} holds a {architectures[0]}, which does not tell the next token; give a "
            "causal language model"
        )


def quantized_by(folder: Path, config: dict[str, Any]) -> str:
    """The library that has quantized a model folder with this config.json, as far as its files say; "" where none has."""
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or config.get("compression_config") or text.get("quantization_config")
    if found:
        return str(found.get("quant_method") or "another") if isinstance(found, dict) else "another"
    files = {"hf_quant_config.json": "modelopt", "quanto_qmap.json": "quanto"}
    return next((library for file, library in files.items() if (folder / file).is_file()), "")


def check_plain(option: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a model folder with this config.json that is quantized, where `option` would quantize it anew."""
    if quantized_by(folder, config):
        raise ValueError(
            f"{option}: {folder} is quantized already, and stays as it is stored; give the folder of the model as it was "
            f"trained, or leave out {option}"
        )


def fit_window(option: str, given: int | None, usual: int, config: dict[str, Any]) -> int:
    """The tokens of a window: what was given, or at most `usual`. Raises ValueError for more than the model was made for, where
    its loss would mean nothing."""
    text = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    most = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    if most is None:
        return usual if given is None else given
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if isinstance(scaling, dict) and "original_max_position_embeddings" not in scaling:
        factor = scaling.get("factor")
        most = int(most * factor) if isinstance(factor, (int, float)) and factor > 1 else most
    if given is not None and given > most:
        raise ValueError(f"{option} {given} is more than the {most} positions of the model; give at most {most}")
    return min(usual, most) if given is None else given


def check_modules(option: str, names: Iterable[str] | None, tensors: Iterable[str]) -> None:
    """Raise ValueError for a name that fits no module of a model whose stored tensors have the names `tensors`."""
    own: set[str] = {"lm_head"}  # one that is tied is not stored
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        own |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    known = own | {f"{prefix}.{name}" for name in own for prefix in ("model", "transformer", "bert", "vit")}
    for name in names or ():
        try:
            # The checkpoint of an inner model names its layers without the first part of the name that they have in the whole:
            # what is left then is the beginning of a name.
            forms = [form for form in (name, name.partition(".")[2]) if form]
            found = any(n.endswith(name) for n in known) or any(
                re.match(rf"(?:{form})(?:(?<=\.)|(?=\.|$))", n) for form in forms for n in known
            )
        except re.error as error:
            raise ValueError(f"{option} {name!r} is no regular expression: {error}") from error
        if not found:
            ends = {each.rpartition(".")[2] for each in own}
            near = difflib.get_close_matches(name, [*own, *ends], n=3, cutoff=0.5) or sorted(own)[:3]
            raise ValueError(f"{option} {name!r} fits no module of the model; near to it are {', '.join(near)}")


def check_space(option: str, path: Path, wanted: float) -> None:
    """Raise OSError where fewer than `wanted` bytes are free for what will be written at `path`."""
    parent = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise OSError(
            f"{option} {path} will take some {wanted / 1e9:,.1f} GB, and {parent} has {free / 1e9:,.1f} GB free"
        )


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
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(2**16))  # a page of a report, and more than a plan
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written: {parent}: {error.strerror or error}") from error


_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia", "privateuseone")
_DRIVERS = {
    "cuda": ("libcuda.so.1", "libcuda.so", "libamdhip64.so", "nvcuda.dll", "amdhip64.dll"),
    "xpu": ("libze_loader.so.1", "libze_loader.so", "ze_loader.dll"),
}
"""One of which is there where torch knows such a device."""


def check_device(name: str) -> str:
    """The name of a device that this machine has. Raises ValueError for another."""
    kind, _, index = name.partition(":")
    if kind == "meta":
        raise ValueError(f"--device {name} computes nothing; give cpu, cuda or another that does")
    if kind not in _DEVICES or (":" in name and not index.isdecimal()):
        raise ValueError(f"--device {name} is not there: devices are cpu, cuda, cuda:1, mps, xpu and the like")
    if kind == "cpu":
        return name
    if kind in _DRIVERS and not any(map(_loads, _DRIVERS[kind])):
        raise ValueError(f"--device {name} is not there: this machine has no driver of a GPU")
    if kind == "mps" and sys.platform != "darwin":
        raise ValueError(f"--device {name} is not there: mps is the GPU of a Mac")
    if kind not in ("cuda", "xpu", "mps") and not metadata.entry_points(group="torch.backends"):
        raise ValueError(f"--device {name} is not there: no package is installed that brings this device to PyTorch")
    import torch

    try:
        torch.empty(1, dtype=torch.float32, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ValueError(f"--device {name} is not there: {reason}") from error
    return name


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
