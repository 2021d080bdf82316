"""Train a quantized language model to say what the original says: quantization-aware training with distillation.

    .venv/bin/python scripts/qat_lm.py --model DIR --text FILE... --format int3-g32 --minutes 15

The weights start where an algorithm left them (--start, by default GPTQ), and are trained with their scales and zero points
on KL(original || quantized) of the next token, over windows of --train text, until the time is up (calibration counts). Then
the model is converted, and its perplexity on --text measured, before and after. The text that is trained on has to be other
text than what is judged by.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from eval_lm import LanguageModel, add_to, bits_per_weight, format_of, perplexity, run_of, with_recipe
from lm_text import INSTALLED, STDLIB, texts_of, windows
from torch import Tensor, nn

import ao
from ao.quant.qat import QATConfig, distillation_loss, parameter_groups


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, help="to judge by: JSON lists of strings, files or folders")
    parser.add_argument("--train", nargs="+", default=[STDLIB, INSTALLED], help="to train and calibrate on")
    parser.add_argument("--exclude", nargs="+", default=[], help="packages and folders to leave out of --train")
    parser.add_argument("--format", default="int3-g32", help="as of eval_lm.py")
    parser.add_argument("--start", default="gptq", help="the recipe that training starts from")
    parser.add_argument("--minutes", type=float, default=15.0, help="in all, calibration and training")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the weights and norms")
    parser.add_argument("--range-lr", type=float, default=1e-5, help="of scales and zero points")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument(
        "--lora-rank", type=int, default=None, help="train adapters of this rank in place of the weights"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=None, help="of --text, evenly spaced; by default all")
    parser.add_argument("--calibration-windows", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the model that is judged; training computes in it too")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--step-time", action="store_true", help="only measure a step, beside one without quantization")
    parser.add_argument("--save", type=Path, help="write the quantized model (safetensors)")
    parser.add_argument("--load", type=Path, help="judge a model that was saved, rather than train one")
    parser.add_argument("--json", type=Path, help="write, or add to, the numbers")
    return parser.parse_args(argv)


def autocast(ids: Tensor, dtype: str) -> torch.autocast:
    """Products in `dtype`."""
    return torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32")


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a model, which share one graph."""
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(dynamic=False)


class Distillation:
    """Steps that bring a model closer to a teacher."""

    def __init__(self, model: nn.Module, teacher: nn.Module, args: argparse.Namespace) -> None:
        self.model, self.teacher, self.args = model, teacher, args
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, args.lr, args.range_lr), betas=(0.9, 0.95), weight_decay=0.0
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def step(self, ids: Tensor, rate: float) -> float:
        """One step on windows (B, T), at `rate` times the learning rates. Returns the divergence before it."""
        for group, lr in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = lr * rate
        with autocast(ids, self.args.dtype):
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = distillation_loss(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def train(distill: Distillation, data: Tensor, end: float) -> int:
    """Steps until `end` (of `time.perf_counter`): a short warm-up, then a rate that falls to 0. Returns their number."""
    start, steps, recent = time.perf_counter(), 0, [0.0]
    size = distill.args.batch
    while (now := time.perf_counter()) < end:
        left = 1 - (now - start) / (end - start)
        batch = data[torch.arange(steps * size, (steps + 1) * size) % len(data)]
        recent.append(distill.step(batch, left * min(1.0, (steps + 1) / 20)))
        steps += 1
        if steps % 50 == 0:
            print(f"  step {steps}, {1 - left:.0%}: KL {sum(recent[-50:]) / 50:.4f}", file=sys.stderr, flush=True)
    return steps


def prepared(what: LanguageModel, args: argparse.Namespace, calibration: Tensor) -> tuple[nn.Module, ao.Config]:
    """The model to train, in float32, and the config that it is trained for."""
    config = with_recipe(format_of(args.format), args.start)
    model = what.load().float().requires_grad_(True)
    # The head is the embedding, and stays what it is.
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    qat = QATConfig(config, step="prepare", range_learning=True, lora_rank=args.lora_rank)
    ao.quantize_(model, qat, what.is_quantized, calibration_data=what.batches(calibration))
    return model, config


def step_time(what: LanguageModel, args: argparse.Namespace, ids: Tensor) -> None:
    """Print the time of a training step without and with quantization, the two taking turns."""
    models: dict[str, nn.Module] = {"plain": what.load().float().requires_grad_(True)}
    args.start = "rtn" if args.start == "gptq" else args.start
    models["follows"] = what.load().float().requires_grad_(True)
    ao.quantize_(models["follows"], QATConfig(with_recipe(format_of(args.format), "rtn")), what.is_quantized)
    models["learned"] = prepared(what, args, ids)[0]
    if args.compile:
        for model in models.values():
            compile_blocks(model)

    def step(model: nn.Module) -> float:
        start = time.perf_counter()
        with autocast(ids, args.dtype):
            logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        if ids.device.type != "cpu":
            torch.accelerator.synchronize()
        model.zero_grad()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(9):
        for name, model in models.items():
            seconds = step(model)
            if turn >= 2:
                times[name].append(seconds)
    middle = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    for name, seconds in middle.items():
        print(f"{name:8} {seconds * 1e3:8.1f} ms  {seconds / middle['plain']:.3f}x")


def ends(what: LanguageModel, args: argparse.Namespace, text: Tensor) -> tuple[float, float]:
    """The perplexity of the original, and of what rounding to nearest makes of it."""
    base, _ = perplexity(what.load(), text)
    nearest = what.load()
    ao.quantize_(nearest, with_recipe(format_of(args.format), "rtn"), what.is_quantized)
    worst, _ = perplexity(nearest, text)
    print(f"{what.folder.name}: perplexity {base:.3f}, {args.format} rounded to nearest {worst:.3f}", flush=True)
    return base, worst


def judge(what: LanguageModel, args: argparse.Namespace, text: Tensor) -> None:
    """Judge a model that was saved."""
    model, original = what.load(), what.load()
    model.load_state_dict(ao.load(args.load), assign=True)
    base, worst = ends(what, args, text)
    found, divergence = perplexity(model, text, original)
    conclude(what, args, text, model, (base, worst, found, divergence), {"seconds": 0, "cpu_seconds": 0, "tokens": 0})


def conclude(
    what: LanguageModel,
    args: argparse.Namespace,
    text: Tensor,
    model: nn.Module,
    numbers: tuple[float, float, float, float | None],
    trained: dict[str, Any],
) -> None:
    """Print and write the perplexities of the original, of rounding to nearest and of the trained model, and the divergence."""
    base, worst, found, divergence = numbers
    closed, bits = (worst - found) / (worst - base), bits_per_weight(model)
    print(f"perplexity {found:.3f}, {closed:.0%} of the distance closed, {bits:.2f} bits per weight")
    if args.json is not None:
        row = {"format": args.format, "recipe": f"qat from {args.start}", "bits": bits, "perplexity": found}
        row |= {"rounded": worst, "divergence": divergence, **trained, "notes": []}
        add_to(args.json, run_of(args, what, base, text.shape[0] * (text.shape[1] - 1)), [row])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    try:
        what = LanguageModel(args.model, args.dtype, args.device, args.window)
        text = what.windows(args.text, args.windows)
        if args.load is not None:
            return judge(what, args, text)
        data = windows(texts_of(args.train, args.exclude), what.tokenizer, what.end, args.window).to(args.device)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).to(data.device)]
    if args.step_time:
        return step_time(what, args, data[: args.batch])
    original = what.load()
    base, worst = ends(what, args, text)
    start, cpu = time.perf_counter(), time.process_time()
    model, _ = prepared(what, args, data[: args.calibration_windows])
    calibrated = time.perf_counter() - start

    if args.compile:
        compile_blocks(model)
        compile_blocks(original)
    steps = train(Distillation(model, original, args), data[args.calibration_windows :], start + 60 * args.minutes)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    ao.quantize_(model, QATConfig(step="convert"), what.is_quantized)
    found, divergence = perplexity(model.to(what.dtype), text, what.load())
    tokens = steps * args.batch * args.window
    took = f"{seconds:.0f} s ({calibrated:.0f} s of it calibration; {cpu:.0f} s of CPU)"
    print(f"{args.format} after {steps} steps, {tokens:,} tokens, {took}:")
    if args.save is not None:
        ao.save(model, args.save)
    trained = {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}
    conclude(what, args, text, model, (base, worst, found, divergence), trained)


if __name__ == "__main__":
    main()
