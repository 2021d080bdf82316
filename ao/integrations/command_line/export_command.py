"""`ao export`: a folder of ours in the form of another library, for engines that do not know us."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .arguments import before_the_work, check_model, check_space, check_writable, quantized_by
from .progress import progress_bar
from .quantize_command import size
from .safetensors_header import read_header, weight_files
from .tables import print_json, print_report

NAME = "export"
HELP = "write a quantized folder in the form of compressed-tensors or GPTQ, for vLLM, SGLang and others"
DETAILS = """compressed-tensors takes integers per row or group, 8-bit weights with 8-bit activations, float8, NVFP4, MXFP4
and MXFP8. GPTQ takes integers in groups of one width, and rounds scales to float16. What has no such form is refused, such as
zero points that are fractions, which configs have under a recipe unless they say otherwise.

examples:
  ao quantize Llama-3.1-8B int4 --config 'Intx(bits=4, block=(1, 128), symmetric=True)' --recipe gptq --data notes.txt
  ao export int4 for-vllm
  ao export int4 for-anyone --to gptq"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a folder that ao has quantized")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    parser.add_argument("--to", choices=["compressed-tensors", "gptq"], default="compressed-tensors")
    parser.add_argument("--shard-size", type=size, default=2 * 10**9, metavar="SIZE", help="of a file (default: 2GB)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        if quantized_by(args.model, check_model(args.model)) != "ao":
            raise ValueError(f"{args.model} is no folder that ao has quantized; use `ao quantize` first")
        if args.out.exists():
            raise FileExistsError(f"{args.out} exists already; give a folder that does not, or remove it")
        check_writable("OUT_DIR", args.out)
        total = sum(t.stop - t.start for f in weight_files(args.model) for t in read_header(f)[1].values())
        check_space("OUT_DIR", args.out, 0.9 * total)
    from ao.integrations.foreign.export import export_folder

    with progress_bar(total, "export", hidden=args.json) as advance:
        report = export_folder(args.model, args.out, args.to, max_shard_bytes=args.shard_size, progress=advance)
    if args.json:
        print_json({"layers": [asdict(row) for row in report.rows], "notes": report.notes})
        return 0
    print_report(report)
    return 0
