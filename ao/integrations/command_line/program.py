"""The program `ao`: its commands, what --help says, and the exit codes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `ao inspect | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except WrongArguments as error:
        sys.stderr.write(f"ao {args.command}: {error}\n")
        return 2
    except OSError as error:
        # Python's own say "[Errno 28] No space left on device: 'report.html'".
        where = f"{error.filename}: " if error.filename else "" if error.errno is None else "the output: "
        sys.stderr.write(f"ao {args.command}: {where + error.strerror if error.strerror else error}\n")
        return 1
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        sys.stderr.write(f"ao {args.command}: {error}\n")
        return 1
    except Exception as error:  # of torch or transformers, such as a lack of memory, or a fault of ours
        if os.environ.get("AO_TRACEBACK"):
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        sys.stderr.write(
            f"ao {args.command}: {type(error).__name__}: {said} (with AO_TRACEBACK=1 in the environment, where it was raised)\n"
        )
        return 1
