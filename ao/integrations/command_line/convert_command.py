"""`ao convert`: a checkpoint that another library has quantized, as a folder of ours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .arguments import before_the_work, check_model, check_readable, check_space, check_writable, quantized_by
from .progress import progress_bar, quiet_loading
from .quantize_command import size
from .safetensors_header import read_header, weight_files
from .tables import print_json, print_report

NAME = "convert"
HELP = "convert what another library has quantized; nothing is rounded anew"
DETAILS = """Reads folders of GPTQ, AWQ (gemm), compressed-tensors, bitsandbytes, HQQ, optimum-quanto, FP8 (DeepSeek, fbgemm,
ModelOpt), MXFP4 (gpt-oss) and NVFP4, and GGUF files. What a weight decodes to stays what it was. In Python,
`from_pretrained(folder, quantization_config=AoConfig("as_stored"))` loads such a folder without writing one.

examples:
  ao convert Llama-3.1-8B-GPTQ out
  ao convert Llama-3.1-8B-Q4_K_M.gguf out
  ao inspect out --summary"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of a quantized model, or a .gguf file")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    parser.add_argument("--shard-size", type=size, default=2 * 10**9, metavar="SIZE", help="of a file (default: 2GB)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    with before_the_work():
        is_file = args.model.suffix == ".gguf"
        if is_file:
            check_readable("MODEL", [args.model])
        elif not (library := quantized_by(args.model, check_model(args.model))):
            raise ValueError(f"{args.model} is not quantized; use `ao quantize`")
        elif library == "ao":
            raise ValueError(f"{args.model} is a folder of ao's already; there is nothing to convert")
        if args.out.exists():
            raise FileExistsError(f"{args.out} exists already; give a folder that does not, or remove it")
        check_writable("OUT_DIR", args.out)
        total = args.model.stat().st_size if is_file else _bytes(args.model)
        check_space("OUT_DIR", args.out, 0.9 * total)
    from ao.integrations.foreign.convert import convert_folder
    from ao.integrations.foreign.gguf_file import convert_gguf

    quiet_loading(args.json)
    convert = convert_gguf if is_file else convert_folder
    with progress_bar(total, "convert", hidden=args.json) as advance:
        report = convert(args.model, args.out, max_shard_bytes=args.shard_size, progress=advance)
    after = sum(file.stat().st_size for file in weight_files(args.out))
    if args.json:
        layers = [asdict(row) for row in report.rows]
        print_json({"bytes_before": total, "bytes_after": after, "layers": layers, "notes": report.notes})
        return 0
    print_report(report)
    print(f"{args.out}: {after:,} bytes, {after / max(total, 1):.3f} of {total:,}")
    return 0


def _bytes(folder: Path) -> int:
    """Of all stored tensors."""
    return sum(t.stop - t.start for file in weight_files(folder) for t in read_header(file)[1].values())
