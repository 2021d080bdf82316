"""`ao autoquant`: the fastest format of every layer, measured on this machine, as a plan to apply elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import (
    before_the_work,
    check_device,
    check_model,
    check_writable,
    count,
    decibels,
    fit_window,
    quantized_by,
)
from .progress import quiet_loading
from .tables import print_json

NAME = "autoquant"
HELP = "measure which format is fastest for every layer, and save the plan"
DETAILS = """The model runs over random token ids of the shapes that you name; every format is timed on every layer, compiled.
The plan is JSON: `ao quantize MODEL_DIR OUT_DIR --plan plan.json` applies it, and so does
`ao.autoquant(model, plan="plan.json")`, without measuring.

examples:
  ao autoquant Llama-3.1-8B --plan plan.json --tokens 1 128
  ao autoquant Llama-3.1-8B --plan plan.json --device cuda --candidates int4 --min-sqnr 25"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a language model")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE.json", help="where to save the plan")
    parser.add_argument("--tokens", type=count, nargs="+", metavar="T", help="default: 1 128")
    parser.add_argument("--batch", type=count, default=1, metavar="B", help="default: 1")
    parser.add_argument(
        "--candidates", default="default", choices=["default", "int4", "float8", "all"], help="which formats"
    )
    parser.add_argument("--min-sqnr", type=decibels, metavar="DB", help="the noise that a layer may have")
    parser.add_argument("--threads", type=count, metavar="N", help="on a CPU; default: PyTorch's")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        config = check_model(args.model, language=True)
        if quantized_by(args.model, config):
            raise ValueError(f"{args.model} is quantized already; give the folder of the model as it was trained")
        args.tokens = [fit_window("--tokens", t, t, config) for t in args.tokens or ()] or [
            1, fit_window("--tokens", None, 128, config)
        ]  # fmt: skip
        check_writable("--plan", args.plan)
        check_device(args.device)
    import torch

    import ao
    from ao.integrations.model_folder import load_model

    quiet_loading(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    model: Any = load_model(args.model, device=args.device)
    vocabulary = model.config.get_text_config().vocab_size
    compiled: Any = torch.compile(model)
    model = ao.autoquant(compiled, candidates=args.candidates, min_sqnr=args.min_sqnr, manual=True)
    with torch.no_grad():
        for tokens in args.tokens:
            ids = torch.randint(vocabulary, (args.batch, tokens), device=args.device)
            model(ids, use_cache=False)
        ao.finalize_autoquant(model)
    report = model.autoquant_report
    args.plan.parent.mkdir(parents=True, exist_ok=True)
    report.save_plan(args.plan)
    if args.json:
        formats = {name: choice.label for choice in report.choices for name in choice.names}
        print_json(
            {"plan": str(args.plan), "before_ms": report.before_ms, "after_ms": report.after_ms, "formats": formats}
        )
    else:
        print(report)
        print(f"saved {args.plan}")
    return 0
