"""`ao eval`: what a language model's formats cost in perplexity."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import (
    at_least,
    before_the_work,
    check_causal,
    check_device,
    check_model,
    check_plain,
    count,
    fit_window,
)
from .format_names import configs_of
from .progress import progress_bar, quiet_loading
from .tables import print_json, print_table
from .texts import check_texts

NAME = "eval"
HELP = "perplexity of a language model, as it is and in other formats"
DETAILS = """Perplexity is exp of the mean loss over the tokens of the texts, in windows that start afresh.

examples:
  ao eval Llama-3.1-8B-int4 --text notes.txt
  ao eval Llama-3.1-8B --text wiki.json --configs bf16 int8 int4-g128 nf4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a causal language model, quantized or not")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain text, or a JSON list"
    )
    parser.add_argument("--configs", nargs="+", metavar="FORMAT", help="quantize in memory; default: as it is stored")
    parser.add_argument("--window", type=at_least(2), metavar="T", help="tokens; default: 512, or what the model takes")
    parser.add_argument("--windows", type=count, metavar="N", help="at most so many; default: all")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        config = check_model(args.model, language=True)
        check_causal("--text", args.model)
        if args.configs:
            check_plain("--configs", args.model, config)
        args.window = fit_window("--window", args.window, 512, config)
        texts = check_texts("--text", args.text, args.model)
        check_device(args.device)
        configs = configs_of(args.configs or ())
        from ao import get_model_size_in_bytes
        from ao.integrations.model_folder import load_model, perplexity, token_windows

        quiet_loading(args.json)
        windows = token_windows(args.model, texts, args.window, args.windows)
    tokens = sum(window.shape[1] - 1 for window in windows)
    rows: list[dict[str, Any]] = []
    for name in args.configs or ["as stored"]:
        model = load_model(args.model, configs.get(name), device=args.device)
        with progress_bar(len(windows), name, hidden=args.json, unit=" windows") as advance:
            loss = perplexity(model, windows, advance)
        rows.append({"format": name, "bytes": get_model_size_in_bytes(model), "perplexity": loss, "tokens": tokens})
        del model
    if args.json:
        print_json(rows)
    else:
        lines = [[row["format"], f"{row['bytes']:,}", f"{row['perplexity']:.4f}"] for row in rows]
        print_table(["format", "bytes", "perplexity"], lines, right=(1, 2))
        print(f"over {tokens:,} tokens in {len(windows)} windows")
    return 0
