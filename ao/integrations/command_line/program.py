"""The program `ao`: its commands, what --help says, and the exit codes."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

from . import (
    autoquant_command,
    bench_command,
    completion,
    convert_command,
    eval_command,
    export_command,
    format_names,
    inspect_checkpoint,
    quantize_command,
)
from .arguments import WrongArguments

COMMANDS: list[ModuleType] = [
    quantize_command,
    autoquant_command,
    convert_command,
    export_command,
    eval_command,
    bench_command,
    inspect_checkpoint,
    format_names,
    completion,
]
"""Each has NAME, HELP and DETAILS, add_arguments(parser), and run(arguments), which returns the exit code."""

ABOUT = """Low-precision numbers for PyTorch models, from the command line.

  ao formats                                             what there is
  ao quantize Llama-3.1-8B out --config int4-g128        a model folder, smaller
  ao inspect out                                         what is in it
  ao eval out --text notes.txt                           what it lost

Exit codes: 0 done, 1 failed, with the reason on standard error, 2 wrong arguments, 130 interrupted."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="ao", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"ao {version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.DETAILS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def version() -> str:
    """That of the package, read from its source: importing it would import torch."""
    source = Path(__file__).resolve().parents[2] / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', source.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names, by default that of the process, and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows any name
    args = parser().parse_args(argv)
    with _interrupts() as interrupts:
        try:
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # `ao inspect | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            code, reason = 130, "interrupted"
        except Exception as error:
            if os.environ.get("AO_TRACEBACK"):
                raise
            code, reason = (130, "interrupted") if interrupts else _told(args.command, error)
    sys.stderr.write(f"{reason}\n")
    return code


def _told(command: str, error: Exception) -> tuple[int, str]:
    """The exit code and the line for an error."""
    said = " ".join(str(error).strip().partition("\n\n")[0].split("\n"))  # transformers tells stories
    if isinstance(error, OSError) and error.strerror:
        # Python's own say "[Errno 28] No space left on device: 'report.html'".
        said = f"{error.filename or 'the output'}: {error.strerror}"
    elif isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        how = '"ao-lowbit[hf]"' if missing in ("transformers", "tokenizers", "safetensors", "accelerate") else missing
        said = f"{missing} is needed here, and not installed: pip install {how}"
    elif not isinstance(error, (ValueError, TypeError, OSError, ImportError, NotImplementedError)):
        # Of torch or transformers, such as a lack of memory, or a fault of ours.
        said = f"{type(error).__name__}: {said} (with AO_TRACEBACK=1 in the environment, where it was raised)"
    return 2 if isinstance(error, WrongArguments) else 1, f"ao {command}: {said}"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals of Ctrl-C that have come. Where one comes while numpy or torch are imported, they raise something else."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
