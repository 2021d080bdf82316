"""`ao bench`: how long a forward pass of a model takes in several formats, compiled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import before_the_work, check_device, check_model, check_plain, count, fit_window
from .format_names import configs_of
from .progress import quiet_loading
from .tables import print_json, print_table

NAME = "bench"
HELP = "time a model's forward pass, as it is and in other formats"
DETAILS = """One pass over batch x tokens random token ids, without a cache, through torch.compile. Medians; the formats take
turns, so that what disturbs one disturbs all. Tokens 1 is like a step of decoding, 128 and more like reading a prompt.

examples:
  ao bench Llama-3.1-8B --configs bf16 int8 int4-g128 --tokens 1 128
  ao bench Llama-3.1-8B-int4 --device cuda --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a language model, quantized or not")
    parser.add_argument("--configs", nargs="+", metavar="FORMAT", help="quantize in memory; default: as it is stored")
    parser.add_argument("--tokens", type=count, nargs="+", metavar="T", help="default: 1 128")
    parser.add_argument("--batch", type=count, default=1, metavar="B", help="default: 1")
    parser.add_argument("--runs", type=count, default=20, metavar="N", help="of each; default: 20")
    parser.add_argument("--threads", type=count, metavar="N", help="on a CPU; default: PyTorch's")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    names = args.configs or ["as stored"]
    with before_the_work():
        config = check_model(args.model, language=True)
        if args.configs:
            check_plain("--configs", args.model, config)
        args.tokens = [fit_window("--tokens", t, t, config) for t in args.tokens or ()] or [
            1, fit_window("--tokens", None, 128, config)
        ]  # fmt: skip
        check_device(args.device)
        configs = configs_of(args.configs or ())
    import statistics

    import torch

    from ao import get_model_size_in_bytes
    from ao.integrations.model_folder import load_model
    from ao.quant.benchmark import interleave, seconds

    quiet_loading(args.json)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    calls: dict[tuple[str, int], Any] = {}
    sizes: dict[str, int] = {}
    with torch.no_grad():
        for name in names:
            model = load_model(args.model, configs.get(name), device=device)
            sizes[name] = get_model_size_in_bytes(model)
            forward = model if args.eager else torch.compile(model)
            for tokens in args.tokens:
                ids = torch.randint(model.config.get_text_config().vocab_size, (args.batch, tokens), device=device)
                calls[name, tokens] = lambda forward=forward, ids=ids: forward(ids, use_cache=False)
                for _ in range(2):
                    calls[name, tokens]()
        timers = {key: lambda call=call: seconds(call, device) for key, call in calls.items()}
        samples = interleave(timers, limit=float("inf"), least=args.runs, most=args.runs)
    rows = [
        {"format": name, "bytes": sizes[name], "tokens": tokens, "ms": 1e3 * statistics.median(samples[name, tokens])}
        for name in names
        for tokens in args.tokens
    ]
    if args.json:
        print_json(rows)
        return 0
    times = {(row["format"], row["tokens"]): row["ms"] for row in rows}
    head = ["format", "bytes", *(f"{tokens} tokens, ms" for tokens in args.tokens)]
    lines = []
    for name in names:
        cells = [
            f"{times[name, t]:.2f}" + ("" if name == names[0] else f" ({times[names[0], t] / times[name, t]:.2f}x)")
            for t in args.tokens
        ]
        lines.append([name, f"{sizes[name]:,}", *cells])
    print_table(head, lines, right=range(1, len(head)))
    return 0
