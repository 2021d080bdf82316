"""`ao quantize`: a model folder to a smaller one, shard by shard."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .format_names import config_of
from .progress import progress_bar
from .safetensors_header import read_header, weight_files
from .tables import print_json

NAME = "quantize"
HELP = "quantize a Hugging Face model folder"
DETAILS = """OUT_DIR is a folder that transformers loads after `import ao.integrations.transformers`, and appears when it is
whole. MODEL_DIR is only read, one tensor at a time: the model may be larger than memory. The output head, and the embedding
that is tied to it, stay as they are unless --include-embedding says so. `ao formats` lists what --config takes.

examples:
  ao quantize Llama-3.1-8B Llama-3.1-8B-int4 --config int4-g128
  ao quantize Llama-3.1-8B out --config 'Intx(bits=3, block=(1, 64))' --skip 'model.layers.0' --report report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="config.json and safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="must not exist yet")
    parser.add_argument("--config", required=True, metavar="FORMAT", help="a name such as int4-g128, or an expression")
    parser.add_argument("--skip", nargs="+", metavar="NAME", help="modules that stay as they are, instead of the head")
    parser.add_argument("--include-embedding", action="store_true", help="quantize embedding and head too")
    parser.add_argument("--shard-size", type=size, default=2 * 10**9, metavar="SIZE", help="of a file; default: 2GB")
    parser.add_argument("--device", default="cpu", help="where to quantize; default: cpu")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page of what happened")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    config = config_of(args.config)
    if config is None:
        raise ValueError(f"--config {args.config} quantizes nothing; `ao formats` lists the formats")
    from ao.integrations import html_report
    from ao.integrations.folder_quantizer import quantize_folder

    if args.report is not None and args.report.is_dir():
        raise ValueError(f"--report {args.report} is a folder; give the name of a file")
    records: list[html_report.LayerRecord] = []

    def watch(name: str, before: Any, after: Any) -> None:
        records.append(html_report.layer_record(name, before, after))

    files = weight_files(args.model) if args.model.is_dir() else []
    total = sum(t.stop - t.start for file in files for t in read_header(file)[1].values())
    with progress_bar(total, "quantize", hidden=args.json) as advance:
        report = quantize_folder(
            args.model,
            args.out,
            config,
            modules_to_not_convert=args.skip,
            include_embedding=args.include_embedding,
            max_shard_bytes=args.shard_size,
            device=args.device,
            watch=watch if args.report else None,
            progress=advance,
        )
    after = sum(file.stat().st_size for file in weight_files(args.out))
    if args.report:
        page = html_report.page_of(args.model.resolve().name, report, records)
        page.measures.append(html_report.Measure("checkpoint", total, after, "bytes"))
        html_report.write_page(page, args.report)
    if args.json:
        rows = [asdict(row) for row in report.rows]
        print_json({"bytes_before": total, "bytes_after": after, "layers": rows, "skipped": report.skipped})
    else:
        print(report)
        print(f"{args.out}: {after:,} bytes, {after / max(total, 1):.3f} of {total:,}")
    return 0


def size(text: str) -> int:
    """Bytes of "2GB", "500MiB" or a number."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.rstrip("KMGTBIkmgtbi ")
    try:
        return max(int(float(digits) * units[text[len(digits) :].strip().upper()]), 1)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"a size is like 2GB or 500MiB, got {text!r}") from None
