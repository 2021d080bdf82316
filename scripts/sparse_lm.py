"""What 2:4 does to a language model: pruners, int4 along with them or after, dense formats of the same size, sparse training.

    .venv/bin/python scripts/sparse_lm.py --model DIR --text FILE... --minutes 20

Each row is a model made of the original, and its perplexity on --text. With --minutes, one more is trained for so long to say
what the original says (distillation, on --train), with 2:4 weights from SparseGPT on; the time includes pruning. The text that is
trained on has to be other text than what is judged by.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eval_lm import LanguageModel, bits_per_weight, perplexity
from lm_text import INSTALLED, STDLIB, texts_of, windows
from measure import facts
from qat_lm import Distillation, train
from tables import markdown
from torch import Tensor, nn

import ao
from ao.dtypes import Intx, Sparse24, Spec
from ao.quant import SpecConfig
from ao.quant.qat import QATConfig
from ao.sparsity import SparseGPT, fake_sparsify_, prune_

INT4 = Intx(4, (1, 128), symmetric=True, scale_dtype="bfloat16")
INT3 = Intx(3, (1, 128), symmetric=True, scale_dtype="bfloat16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, help="to judge by: JSON lists of strings, files or folders")
    parser.add_argument("--train", nargs="+", default=[STDLIB, INSTALLED], help="to train and calibrate on")
    parser.add_argument("--exclude", nargs="+", default=[], help="packages and folders to leave out of --train")
    parser.add_argument("--minutes", type=float, default=0.0, help="of sparse training; 0 for none")
    parser.add_argument("--decay", type=float, default=2e-4, help="of pruned weights in training")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--range-lr", type=float, default=None)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=None, help="of --text, evenly spaced; by default all")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the model that is judged; training computes in it too")
    parser.add_argument("--threads", type=int, help="on a CPU")
    parser.add_argument("--skip-rows", action="store_true", help="only the original, magnitude, SparseGPT, training")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


class Bench:
    """Makes models of one original, and judges them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.what = LanguageModel(args.model, args.dtype, args.device, args.window)
        self.text = self.what.windows(args.text, args.windows)
        found = windows(texts_of(args.train, args.exclude), self.what.tokenizer, self.what.end, args.window).to(
            args.device
        )
        self.data = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).to(found.device)]
        self.calibration = self.what.batches(self.data[: args.calibration_windows])
        self.rows: list[dict[str, Any]] = []

    def row(self, name: str, make: Callable[[nn.Module], Any], model: nn.Module | None = None) -> float:
        """The perplexity of the original, or of `model`, after `make`."""
        model = self.what.load() if model is None else model
        start = time.perf_counter()
        made = make(model)
        seconds = time.perf_counter() - start
        model = made if isinstance(made, nn.Module) else model
        found, _ = perplexity(model.to(self.what.dtype), self.text)
        self.rows.append({"model": name, "perplexity": found, "bits": bits_per_weight(model), "seconds": seconds})
        print(f"{name}: {found:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        return found

    def pruned(self, name: str, algorithm: str | SparseGPT, then: bool = False) -> float:
        """The perplexity of the original pruned to 2:4; `then`, also of that in int4."""
        model = self.what.load()
        keep = self.what.is_quantized
        start = time.perf_counter()
        prune_(model, algorithm, filter_fn=keep, calibration_data=self.calibration)
        seconds = time.perf_counter() - start
        again = copy.deepcopy(model)
        found = self.row(name, lambda m: ao.quantize_(m, Sparse24(), keep), model)
        self.rows[-1]["seconds"] += seconds
        if then:
            self.row(f"{name}, then int4", lambda m: ao.quantize_(m, Sparse24(INT4), keep), again)
        return found

    def quantized(self, spec: Spec, recipe: str) -> Callable[[nn.Module], None]:
        """Quantized in one pass."""

        def make(model: nn.Module) -> None:
            config = SpecConfig(spec, algorithm=recipe)
            ao.quantize_(model, config, self.what.is_quantized, calibration_data=self.calibration)

        return make

    def trained(self, model: nn.Module) -> nn.Module:
        """Sparse training with distillation."""
        args, end = self.args, time.perf_counter() + 60 * self.args.minutes
        prune_(model, "sparsegpt", filter_fn=self.what.is_quantized, calibration_data=self.calibration)
        model = model.float().requires_grad_(True)
        model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        fake_sparsify_(model, self.what.is_quantized, decay=args.decay)
        data: Tensor = self.data[args.calibration_windows :]
        steps = train(Distillation(model, self.what.load(), args), data, end)
        ao.quantize_(model, QATConfig(step="convert"))
        print(f"{steps} steps, {steps * args.batch * args.window:,} tokens", file=sys.stderr, flush=True)
        return model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(args)
    base = bench.row("original", lambda model: None)
    worst = bench.pruned("2:4 by magnitude", "magnitude")
    if not args.skip_rows:
        bench.pruned("2:4 by Wanda", "wanda")
        bench.pruned("2:4 by SparseGPT as in its paper", SparseGPT(rounds=0, match_original=False))
    pruned = bench.pruned("2:4 by SparseGPT", "sparsegpt", then=not args.skip_rows)
    if not args.skip_rows:
        bench.row("2:4 by SparseGPT along with int4", bench.quantized(Sparse24(INT4), "sparsegpt"))
        bench.row("int3, GPTQ", bench.quantized(INT3, "gptq"))
    if args.minutes:
        found = bench.row(f"2:4, {args.minutes:g} minutes of training", bench.trained)
        print(f"of the loss of 2:4 by magnitude {(worst - found) / (worst - base):.0%} is closed, of that of SparseGPT "
              f"{(pruned - found) / (pruned - base):.0%}")  # fmt: skip
    lines = [
        [r["model"], f"{r['bits']:.2f}", f"{r['perplexity']:.3f}", f"{r['perplexity'] / base:.2f}"] for r in bench.rows
    ]
    print(markdown(["model", "bits", "perplexity", "of the original's"], lines))
    if args.json is not None:
        old = json.loads(args.json.read_text()) if args.json.exists() else {"runs": []}
        tokens = bench.text.shape[0] * (bench.text.shape[1] - 1)
        old["runs"].append({**facts(torch.device(args.device)), "tokens": tokens, "rows": bench.rows})
        args.json.write_text(json.dumps(old, indent=1) + "\n")


if __name__ == "__main__":
    main()
