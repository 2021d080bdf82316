"""Fill in the table of 4-bit formats of docs/formats.md: bits, noise on a normal weight, and what a language model loses.

    .venv/bin/python scripts/four_bits.py          rewrite what stands between `<!-- table: four-bits -->` and `<!-- end -->`
    .venv/bin/python scripts/four_bits.py --check  exit with an error if that would change anything

The noise is computed here; perplexities come from docs/measured/accuracy-4bit.json, which eval_lm.py (--recipes rtn, any others
beside it) and qat_lm.py write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accuracy import MEASURED, Numbers
from eval_lm import format_of
from tables import ROOT, fill, markdown

import ao

PAGE = ROOT / "docs" / "formats.md"

FORMATS = {
    "int4-g128": "int4-g128",
    "int4-g32": "int4-g32",
    "int4, symmetric, 64 to a bfloat16 scale": "Intx(bits=4, block=(1, 64), symmetric=True, scale_dtype='bfloat16')",
    "int4, symmetric, 32 to a bfloat16 scale": "Intx(bits=4, block=(1, 32), symmetric=True, scale_dtype='bfloat16')",
    "NF4": "nf4",
    "MXFP4": "mxfp4",
    "MXFP4, scales by `even`": "MXFPWeightOnlyConfig()",
    "NVFP4": "nvfp4",
    "NVFP4, `four_over_six`": "NVFP4WeightOnlyConfig(four_over_six=True)",
}
"""What the table calls a format -> what eval_lm.py was given."""

RECIPES = {
    "rtn": "rounded",
    "rotation(32)+rtn": "rotated by 32",
    "gptq": "GPTQ",
    "rotation(32)+gptq": "rotated by 32, GPTQ",
    "qat from gptq": "trained",
}


def four_bits(folder: Path = MEASURED) -> str:
    """The formats in the order of their bits; those that were not measured have a dash."""
    data = Numbers(folder / "accuracy-4bit.json")
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    recipes = [recipe for recipe in RECIPES if recipe in data.recipes]
    rows = []
    for label, name in FORMATS.items():
        config = format_of(name)
        spec = config if isinstance(config, ao.Spec) else config.weight(tuple(weight.shape))
        q = spec.quantize(weight)
        bits, noise = 8 * q.nbytes_packed / q.numel(), float(ao.compute_error(weight, q.dequantize()))
        found = [data.get(name, recipe) for recipe in recipes]
        cells = ["-" if row is None else f"{row['perplexity']:.2f}" for row in found]
        rows.append((bits, [label, f"{bits:.2f}", f"{noise:.1f}", *cells]))
    head = ["format", "bits per element", "signal to noise, dB", *(f"perplexity, {RECIPES[r]}" for r in recipes)]
    return f"{markdown(head, [row for _, row in sorted(rows)])}\n\n{data.origin()}"


if __name__ == "__main__":
    fill(PAGE, {"four-bits": four_bits}, "--check" in sys.argv[1:])
