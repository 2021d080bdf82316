"""`ao quantize`: a model folder to a smaller one, shard by shard."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .arguments import (
    at_least,
    before_the_work,
    check_causal,
    check_device,
    check_model,
    check_modules,
    check_readable,
    check_space,
    check_writable,
    count,
    fit_window,
    quantized_by,
)
from .format_names import PLAIN, check_option, check_plan, check_recipe, config_of
from .progress import progress_bar, quiet_loading
from .safetensors_header import read_header, weight_files
from .tables import print_json, print_report
from .texts import check_texts

NAME = "quantize"
PRUNERS = ("magnitude", "wanda", "sparsegpt")
HELP = "quantize a Hugging Face model folder"
DETAILS = """OUT_DIR is a folder that transformers loads after `import ao.integrations.transformers`, and appears when it is
whole. MODEL_DIR is only read, one tensor at a time: the model may be larger than memory. The output head, and the embedding
that is tied to it, stay as they are unless --include-embedding says so. `ao formats` lists what --config takes.

--recipe finds better codes than rounding to nearest does:
  hqq                          needs no data, and still reads one tensor at a time
  gptq, awq, smoothquant, bias_correction, or several: awq+gptq
                               run the model, which has to fit in memory, on --data; on --device, a block at a time
  magnitude, wanda, sparsegpt  with --sparsity 2:4, choose which two of four weights stay; the last two on --data

examples:
  ao quantize Llama-3.1-8B Llama-3.1-8B-int4 --config int4-g128
  ao quantize Llama-3.1-8B out --config int4-g128 --recipe hqq
  ao quantize Llama-3.1-8B out --config 'Intx(bits=3, block=(1, 64))' --recipe awq+gptq --data notes.txt --device cuda
  ao quantize Llama-3.1-8B out --config int4-g128 --sparsity 2:4 --recipe sparsegpt --data notes.txt
  ao quantize Llama-3.1-8B out --config int8 --skip lm_head model.layers.0 --report out.html --text wiki.json --latency 1 128"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="config.json and safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="must not exist yet")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FORMAT", help="a name such as int4-g128, or an expression")
    what.add_argument("--plan", type=Path, metavar="FILE.json", help="what `ao autoquant` has chosen, layer by layer")
    parser.add_argument(
        "--sparsity", choices=["2:4"], help="prune to two of four, and store those; by --recipe, or by magnitude"
    )
    parser.add_argument("--recipe", metavar="NAME", help="how codes are found: rtn (the default), hqq, gptq, ...")
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="FILE", help="to calibrate on: plain text or a JSON list"
    )
    parser.add_argument("--samples", type=count, metavar="N", help="windows of --data; default: 128")
    parser.add_argument("--window", type=at_least(2), metavar="T", help="tokens of a window; default: 512")
    parser.add_argument("--skip", nargs="+", metavar="NAME", help="modules that stay as they are, instead of the head")
    parser.add_argument("--include-embedding", action="store_true", help="quantize embedding and head too")
    parser.add_argument("--in-memory", action="store_true", help="load the whole model, as recipes with data do")
    parser.add_argument("--shard-size", type=size, default=2 * 10**9, metavar="SIZE", help="of a file; default: 2GB")
    parser.add_argument("--device", default="cpu", help="where to quantize, and to measure; default: cpu")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page of what happened")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="measure perplexity on it, before and after"
    )
    parser.add_argument(
        "--latency",
        type=count,
        nargs="+",
        metavar="T",
        help="time the largest layers on so many tokens, before and after",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        data, texts = _check(args)
        config, calibrates = _config(args)
        from ao.integrations.model_folder import calibration_batches, load_model, perplexity, token_windows

        quiet_loading(args.json)
        batches = calibration_batches(args.model, data, args.window, args.samples or 128) if args.data else None
        windows = token_windows(args.model, texts, args.window) if args.text else []
    from ao.dtypes import cpp_compiler
    from ao.integrations import html_report
    from ao.integrations.folder_quantizer import quantize_folder, quantize_folder_in_memory
    from ao.integrations.layer_latency import LargestLayers, layer_latencies

    def loss(folder: Path, what: str) -> float:
        model = load_model(folder, device=args.device)
        with progress_bar(len(windows), what, hidden=args.json, unit=" windows") as advance:
            return perplexity(model, windows, advance)

    records: list[html_report.LayerRecord] = []
    largest = LargestLayers()

    def watch(name: str, before: Any, after: Any) -> None:
        if args.report:
            records.append(html_report.layer_record(name, before, after))
        if args.latency:
            largest.add(before, after)

    measures: list[html_report.Measure] = []
    before = loss(args.model, "perplexity before") if windows else None
    files = weight_files(args.model) if args.model.is_dir() else []
    total = sum(t.stop - t.start for file in files for t in read_header(file)[1].values())
    common = {
        "modules_to_not_convert": args.skip,
        "include_embedding": args.include_embedding,
        "max_shard_bytes": args.shard_size,
        "device": args.device,
        "watch": watch if args.report or args.latency else None,
    }
    if calibrates or args.in_memory:
        report = quantize_folder_in_memory(args.model, args.out, config, calibration_data=batches, **common)
    else:
        with progress_bar(total, "quantize", hidden=args.json) as advance:
            report = quantize_folder(args.model, args.out, config, progress=advance, **common)
    size_after = sum(file.stat().st_size for file in weight_files(args.out))
    measures.append(html_report.Measure("checkpoint", total, size_after, "bytes"))
    if before is not None:
        measures.append(html_report.Measure("perplexity", before, loss(args.out, "perplexity after")))
    times, failures = layer_latencies(largest.most(4), args.latency or (), args.device)
    measures += times
    report.notes += failures
    if batches is not None:
        report.notes.append(f"calibrated on {len(batches)} windows of at most {args.window} tokens")
    if cpp_compiler() is None and (args.device or "cpu").startswith("cpu"):
        report.notes.append(
            "no C++ compiler was found ($CXX, g++, clang++): on a CPU, eager products decode the weights at every call; with one "
            "they decode in registers, and are several times faster"
        )
    if args.report:
        page = html_report.page_of(args.model.resolve().name, report, records, measures)
        page.facts.update(_facts(args, len(batches or ()), sum(window.shape[1] - 1 for window in windows)))
        html_report.write_page(page, args.report)
    if args.json:
        print_json(
            {
                "bytes_before": total,
                "bytes_after": size_after,
                "measures": [asdict(measure) for measure in measures],
                "layers": [asdict(row) for row in report.rows],
                "skipped": report.skipped,
                "notes": report.notes,
            }
        )
        return 0
    print_report(report)
    for measure in measures[1:]:
        unit = f" {measure.unit}" if measure.unit else ""
        print(f"{measure.name}: {measure.before:.4g}{unit} before, {measure.after:.4g}{unit} after")
    print(f"{args.out}: {size_after:,} bytes, {size_after / max(total, 1):.3f} of {total:,}")
    return 0


def _check(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts of --data and --text. Raises for arguments that do not go together or name what is not there.

    Nothing here imports torch: a mistake is told at once.
    """
    model = check_model(args.model)
    if quantized_by(args.model, model):
        raise ValueError(f"{args.model} is quantized already; give the folder of the model as it was trained")
    check_readable("--plan", [args.plan] if args.plan else None)
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already; give a folder that does not, or remove it")
    if args.model.resolve() in args.out.resolve().parents:
        raise ValueError(f"OUT_DIR {args.out} lies in {args.model}, which is only read; give a folder beside it")
    check_writable("OUT_DIR", args.out)
    check_writable("--report", args.report)
    if args.data and model.get("is_encoder_decoder"):
        raise ValueError(
            f"--data: {args.model} is an encoder and a decoder, and a window of text is for one; in Python, "
            "quantize_(model, config, calibration_data=batches) takes any inputs"
        )
    if args.text:
        check_causal("--text", args.model)
    if args.window is not None and not (args.data or args.text):
        raise ValueError(
            f"--window {args.window} cuts the texts of --data and --text, and neither is given; leave it out"
        )
    if args.samples is not None and not args.data:
        raise ValueError(f"--samples {args.samples} is for --data, which is not given; leave it out")
    data = check_texts("--data", args.data, args.model) if args.data else []
    texts = check_texts("--text", args.text, args.model) if args.text else []
    if args.data or args.text:
        args.window = fit_window("--window", args.window, 512, model)
    stored = {name: t for file in weight_files(args.model) for name, t in read_header(file)[1].items()}
    check_modules("--skip", args.skip, stored)
    # A format takes an eighth of 16 bits at least; what stays as it is, is not counted.
    check_space("OUT_DIR", args.out, sum(t.stop - t.start for t in stored.values()) / 8)
    check_device(args.device)
    if args.sparsity is not None:
        if args.plan is not None:
            raise ValueError("--sparsity goes with --config; a plan says itself what each layer becomes")
        args.recipe = args.recipe or "magnitude"
    elif args.recipe in PRUNERS:
        raise ValueError(f"--recipe {args.recipe} prunes; say how with --sparsity 2:4")
    if args.recipe is not None:
        try:
            check_recipe(args.recipe)
        except ValueError as error:
            raise ValueError(f"--recipe {error}") from None
    if args.plan is not None:
        calibrates = check_plan(args.plan, args.recipe)
    elif args.config in PLAIN and args.sparsity is None:
        raise ValueError(f"--config {args.config} quantizes nothing; `ao formats` lists the formats")
    else:
        calibrates = check_option("--config", args.config, args.recipe)
    if calibrates and not args.data:
        what = f"--recipe {args.recipe}" if args.recipe else f"--config {args.config!r}"
        raise ValueError(f"{what} needs texts to calibrate on; give --data FILE, plain text or a JSON list of strings")
    if args.data and not calibrates:
        raise ValueError(
            "--data is for recipes that calibrate, such as --recipe gptq, and nothing here does; leave it out"
        )
    return data, texts


def _config(args: argparse.Namespace) -> tuple[Any, bool]:
    """The config, and whether it calibrates."""
    if args.plan is None:
        config = config_of(args.config)
    else:
        from ao.quant import load_plan

        config = load_plan(args.plan)
    if args.sparsity is not None:
        from ao.quant.sparse_presets import two_of_four

        config = two_of_four(config)
    if args.recipe is not None:
        config = with_recipe(config, args.recipe)
    return config, needs_data(config)


def with_recipe(config: Any, recipe: str) -> Any:
    """The same config, or Spec, or rules, with a recipe by name. Raises ValueError for a name that is none."""
    from ao.quant import read_format
    from ao.quant.config import parse_recipe

    parse_recipe(recipe, "--recipe")
    return read_format.with_recipe(config, recipe)


def needs_data(config: Any) -> bool:
    """Whether a config, a Spec or rules have something to calibrate."""
    if hasattr(config, "fqn_to_config"):
        return any(needs_data(each) for each in config.fqn_to_config.values())
    return hasattr(config, "recipe") and bool(config.recipe.needs or config.act_range())


def _facts(args: argparse.Namespace, batches: int, tokens: int) -> dict[str, str]:
    """How the numbers of the page came about."""
    import torch

    facts = {}
    if batches:
        facts["calibration"] = f"{batches} windows of at most {args.window} tokens"
    if tokens:
        facts["perplexity"] = f"{tokens:,} tokens, in windows of {args.window}"
    if args.latency:
        device = torch.device(args.device)
        where = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{args.device} ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"
        )
        facts["latency"] = (
            f"one linear layer, compiled, weights not in the cache, on {where}, torch {torch.__version__}"
        )
    return facts


def size(text: str) -> int:
    """Bytes of "2GB", "500MiB" or a number."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.rstrip("KMGTBIkmgtbi ")
    try:
        found = int(float(digits) * units[text[len(digits) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"a size is like 2GB or 500MiB, got {text!r}")
    return found
