"""The perplexity of a local causal language model in every format, found by every recipe.

    .venv/bin/python scripts/eval_lm.py --model DIR --text FILE... [--formats ...] [--recipes ...]

prints a table, writes JSON (--json) and a plot of size against perplexity (--plot), and says layer by layer what quantization
costs (--layers). docs/accuracy.md is made of such JSON files by scripts/accuracy.py.

Perplexity is exp of the mean negative log likelihood per token over windows of --window tokens, each predicted from its own
start. The divergence is the mean over the same tokens of KL(original || quantized), which sees what perplexity averages
out. What is quantized: all linear layers but the output head. Calibration (--calibration) uses other text, by default the
standard library of the Python that runs this.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.util
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from formats import config_of
from lm_text import STDLIB, texts_of, windows
from torch import Tensor, nn

import ao
from ao.quant.kv_cache import kv_cache_config

LM_FORMATS = {
    "int4-g32": "Int4WeightOnlyConfig(group_size=32)",
    "int4-g128": "Int4WeightOnlyConfig(group_size=128)",
    "int3-g32": "UIntXWeightOnlyConfig(torch.uint3, group_size=32)",
    "int3-g128": "UIntXWeightOnlyConfig(torch.uint3, group_size=128)",
    "int2-g32": "UIntXWeightOnlyConfig(torch.uint2, group_size=32)",
    "int8-int4": "Int8DynamicActivationInt4WeightConfig(group_size=32)",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig()",
    "int8": "Int8WeightOnlyConfig()",
    "float8": "Float8WeightOnlyConfig()",
    "nf4": "NF4WeightOnlyConfig()",
}
"""Name -> an expression over the public names of `ao`, and `torch`; besides those of formats.py."""

RECIPES = ("rtn", "hqq", "gptq")


class LanguageModel:
    """A folder with a causal language model, and text to judge it by."""

    def __init__(self, folder: Path, dtype: str, device: str, window: int) -> None:
        import transformers
        from tokenizers import Tokenizer

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        for name in ("config.json", "tokenizer.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; --model takes a Hugging Face folder")
        self.folder, self.device, self.dtype, self.window = folder, device, getattr(torch, dtype), window
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        end = json.loads((folder / "config.json").read_text()).get("eos_token_id")
        self.end: int | None = end[0] if isinstance(end, list) else end
        self.auto: Any = transformers.AutoModelForCausalLM

    def load(self) -> nn.Module:
        """The model as it is stored."""
        model = self.auto.from_pretrained(self.folder, dtype=self.dtype, local_files_only=True)
        return model.to(self.device).eval().requires_grad_(False)

    def windows(self, paths: list[str], most: int | None) -> Tensor:
        """Windows of tokens of text."""
        return windows(texts_of(paths), self.tokenizer, self.end, self.window, most).to(self.device)

    @staticmethod
    def is_quantized(module: nn.Module, name: str) -> bool:
        """What is quantized: all linear layers but the head."""
        return ao.is_linear(module, name) and name != "lm_head"

    @staticmethod
    def batches(ids: Tensor, size: int = 8) -> list[dict[str, Any]]:
        """Windows as calls of the model."""
        return [{"input_ids": part, "use_cache": False} for part in ids.split(size)]


@torch.inference_mode()
def perplexity(
    model: nn.Module, ids: Tensor, reference: nn.Module | None = None, cache: str | None = None
) -> tuple[float, float | None]:
    """Perplexity over windows (W, T), and the mean KL divergence from a reference. cache: how keys and values are quantized."""
    nll, kl, count = 0.0, 0.0, 0
    for batch in LanguageModel.batches(ids):
        own = batch if cache is None else batch | cached(model, cache, ids.shape[1])
        log_p = F.log_softmax(model(**own).logits[:, :-1].float(), -1)  # (B, T - 1, V)
        targets = batch["input_ids"][:, 1:]
        nll -= float(log_p.gather(-1, targets[..., None]).double().sum())
        count += targets.numel()
        if reference is not None:
            log_q = F.log_softmax(reference(**batch).logits[:, :-1].float(), -1)
            kl += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True).double())
    return math.exp(nll / count), None if reference is None else kl / count


def cached(model: Any, cache: str, length: int) -> dict[str, Any]:
    """Arguments of a call that reads all keys and values from a quantized cache."""
    from ao.integrations.transformers import QuantizedCache

    return {"past_key_values": QuantizedCache(model.config, cache, length), "use_cache": True}


def cache_rows(model: Any, ids: Tensor, names: list[str], divergence: bool) -> Iterator[dict[str, Any]]:
    """Perplexity and divergence of the model with quantized keys and values, and the bits of a number of those."""
    from ao.quant.kv_cache import KVCache

    text = model.config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in names:
        start = time.perf_counter()
        found, kl = perplexity(model, ids, model if divergence else None, name)
        kv = KVCache(name, 1, 1, 2**16, dim)
        row = {"format": f"KV cache {name}", "recipe": "", "bits": 8 * kv.nbytes_packed / (2 * 2**16 * dim)}
        yield {**row, "perplexity": found, "divergence": kl, "seconds": time.perf_counter() - start}


def bits_per_weight(model: nn.Module) -> float:
    """Bits that the quantized layers take per weight."""
    weights = [m.weight for name, m in model.named_modules() if LanguageModel.is_quantized(m, name)]
    return 8 * sum(w.nbytes for w in weights) / sum(w.numel() for w in weights)


def with_recipe(config: ao.Config | ao.Spec, recipe: str) -> ao.Config:
    """A config with another algorithm."""
    if isinstance(config, ao.Spec):
        return ao.SpecConfig(config, algorithm=recipe_of(recipe))
    return dataclasses.replace(config, algorithm=recipe_of(recipe))


def recipe_of(name: str) -> str | ao.Recipe:
    """A recipe's name, or an expression such as "GPTQ(rounds=0)"."""
    if "(" not in name:
        return name
    return eval(name, {public: getattr(ao, public) for public in ao.__all__})


def format_of(name: str) -> ao.Config | ao.Spec:
    """The config of a format's name, or of an expression. Raises ValueError for what is neither, or not quantized."""
    config = config_of(LM_FORMATS.get(name, name))
    if config is None:
        raise ValueError(f"{name!r} is not quantized; the original model is measured in any case, in --dtype")
    return config


@torch.inference_mode()
def layer_noise(model: nn.Module, reference: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
    """For each quantized layer, the signal to noise ratio of its weight and of its output, in dB. The output of the
    quantized model, with all that came before it, is held against that of the original one on the same text."""
    outputs: dict[str, dict[str, Tensor]] = {"model": {}, "reference": {}}

    def keep(into: dict[str, Tensor], name: str) -> Callable[..., None]:
        return lambda module, args, output: into.__setitem__(name, output.float())

    layers = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), ao.QTensor)}
    for which, each in (("model", model), ("reference", reference)):
        modules = dict(each.named_modules())
        handles = [modules[name].register_forward_hook(keep(outputs[which], name)) for name in layers]
        each(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
    originals = dict(reference.named_modules())
    for name, layer in layers.items():
        weight = layer.weight.dequantize()
        yield {
            "layer": name,
            "weight_db": float(ao.compute_error(originals[name].weight, weight)),
            "output_db": float(ao.compute_error(outputs["reference"][name], outputs["model"][name])),
        }


def table(rows: list[dict[str, Any]], base: float) -> str:
    """The results as text: closed is how much of the distance from round-to-nearest to the original a recipe wins back."""
    nearest = {row["format"]: row["perplexity"] for row in rows if row["recipe"] == "rtn"}
    lines = [("format", "recipe", "bits", "perplexity", "closed", "divergence", "seconds")]
    for row in rows:
        worst = nearest.get(row["format"])
        closed = (
            "" if worst is None or row["recipe"] == "rtn" else f"{(worst - row['perplexity']) / (worst - base):.0%}"
        )
        kl = "" if row.get("divergence") is None else f"{row['divergence']:.4f}"
        lines.append(
            (
                row["format"],
                row["recipe"],
                f"{row['bits']:.2f}",
                f"{row['perplexity']:.3f}",
                closed,
                kl,
                f"{row['seconds']:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(ln, widths))) for ln in lines]
    return "\n".join(line.rstrip() for line in [text[0], "-" * len(text[0]), *text[1:]])


def plot(rows: list[dict[str, Any]], base: float, path: Path) -> None:
    """Size against perplexity, a line per recipe."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ao"
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for recipe in dict.fromkeys(row["recipe"] for row in rows if row["recipe"]):
        points = sorted((row["bits"], row["perplexity"]) for row in rows if row["recipe"] == recipe)
        axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1.2, label=recipe)
    axes.axhline(base, color="black", linewidth=0.8, linestyle=":", label="original")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, help="to judge by: JSON lists of strings, files or folders")
    parser.add_argument("--calibration", nargs="+", default=[STDLIB], help="other text, for the recipes that take some")
    parser.add_argument("--formats", nargs="+", default=["int4-g32", "int3-g32", "int2-g32"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names, joined by +, or expressions")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=None, help="of the text, evenly spaced; by default all")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument(
        "--divergence", action="store_true", help="measure KL(original || quantized) too; twice the time"
    )
    parser.add_argument("--layers", action="store_true", help="per layer: signal to noise of weights and outputs")
    parser.add_argument(
        "--kv-cache",
        nargs="+",
        default=[],
        metavar="NAME",
        help="quantize keys and values, not weights: int8, int4, kivi4, ...",
    )
    parser.add_argument("--rotate", action="store_true", help="rotate the model first (ao.rotate_)")
    parser.add_argument("--rotate-block", type=int, help="rotate so many numbers among themselves, rather than all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write, or add to, the numbers")
    parser.add_argument("--plot", type=Path, help="write a plot (SVG)")
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def run_of(args: argparse.Namespace, what: LanguageModel, base: float, tokens: int) -> dict[str, Any]:
    """What the numbers were measured with."""
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        device = str(torch.get_device_module(args.device).get_device_name())
    script, *given = sys.argv
    outputs = {i for i, a in enumerate(given) if a in ("--json", "--plot", "--save")}
    kept = [Path(a).name if "/" in a else a for i, a in enumerate(given) if i not in outputs and i - 1 not in outputs]
    command = shlex.join([f"scripts/{Path(script).name}", *kept])
    return {
        "model": what.folder.resolve().name,
        "device": device,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "tokens": tokens,
        "perplexity": base,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        what = LanguageModel(args.model, args.dtype, args.device, args.window)
        text = what.windows(args.text, args.windows)
        formats = [] if args.kv_cache else args.formats
        calibration = what.windows(args.calibration, args.calibration_windows) if formats else text
        configs = [(name, recipe, with_recipe(format_of(name), recipe)) for name in formats for recipe in args.recipes]
        for name in args.kv_cache:
            kv_cache_config(name)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
    original = what.load()
    base, _ = perplexity(original, text)
    print(
        f"{what.folder.name}: perplexity {base:.3f} over {text.shape[0]} windows of {text.shape[1]} tokens", flush=True
    )
    run = run_of(args, what, base, text.shape[0] * (text.shape[1] - 1))
    rows: list[dict[str, Any]] = []
    for row in cache_rows(original, text, args.kv_cache, args.divergence):
        rows.append(row)
        print(f"  {row['format']}: {row['perplexity']:.4f}", file=sys.stderr, flush=True)
    for name, recipe, config in configs:
        model = what.load()
        start = time.perf_counter(), time.process_time()
        if args.rotate or args.rotate_block:
            ao.rotate_(model, block=args.rotate_block)
        assert config is not None
        report = ao.quantize_(model, config, what.is_quantized, calibration_data=what.batches(calibration))
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        found, kl = perplexity(model, text, original if args.divergence else None)
        turned = f"rotation({args.rotate_block})" if args.rotate_block else "rotation"
        label = f"{turned}+{recipe}" if args.rotate or args.rotate_block else recipe
        row = {"format": name, "recipe": label, "bits": bits_per_weight(model), "perplexity": found, "divergence": kl}
        rows.append({**row, "seconds": seconds, "cpu_seconds": cpu, "notes": report.notes})
        if args.layers:
            rows[-1]["layers"] = list(layer_noise(model, original, text[:2]))
        print(f"  {name} {label}: {found:.3f} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    print(table(rows, base))
    if args.layers:
        for row in rows:
            print(f"\n{row['format']} {row['recipe']}: signal to noise, dB, of weight and output")
            for each in row["layers"]:
                print(f"  {each['layer']:40} {each['weight_db']:6.1f} {each['output_db']:6.1f}")
    if args.json is not None:
        add_to(args.json, run, rows)
    if args.plot is not None:
        plot(rows, base, args.plot)


def add_to(path: Path, run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run and its rows; older rows of the same format and recipe make way."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
    index = len(data["runs"])
    data["runs"].append(run)
    new = {(row["format"], row["recipe"]) for row in rows}
    data["rows"] = [row for row in data["rows"] if (row["format"], row["recipe"]) not in new]
    data["rows"] += [{**row, "run": index} for row in rows]
    used = sorted({row["run"] for row in data["rows"]})
    data["runs"] = [data["runs"][i] for i in used]
    data["rows"] = [{**row, "run": used.index(row["run"])} for row in data["rows"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
