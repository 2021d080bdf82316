"""What other libraries make of the same model, format and data as eval_lm.py, where they are installed.

    .venv/bin/python scripts/accuracy_peers.py --model DIR --text FILE... --json docs/measured/accuracy-peers.json

Each library quantizes the linear layers in its own way; what its codes stand for is then judged like ours. A library is
imported when it is asked for; none is needed. Their sizes count codes, scales and zero points as the library stores them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from eval_lm import LanguageModel, add_to, format_of, parse_args, perplexity, run_of
from torch import nn
from torch.utils.data import DataLoader

Peer = Callable[[nn.Module, int, int, list[dict[str, Any]]], float]
"""(model, bits, group size, batches) -> bits per weight; the model's weights become what the library makes of them."""


def linears(model: nn.Module) -> list[nn.Linear]:
    """What is quantized."""
    return [m for name, m in model.named_modules() if LanguageModel.is_quantized(m, name) and isinstance(m, nn.Linear)]


def hqq(model: nn.Module, bits: int, group: int, batches: list[dict[str, Any]]) -> float:
    """hqq: its own optimizer, scales and zero points in 16 bits."""
    quantizer: Any = importlib.import_module("hqq.core.quantize").Quantizer
    for layer in linears(model):
        weight = layer.weight.detach()
        q, meta = quantizer.quantize(
            weight.float(), nbits=bits, group_size=group, axis=1, compute_dtype=torch.float16, device=str(weight.device)
        )
        weight.copy_(quantizer.dequantize(q, meta).float())
    return bits + 32 / group


def torchao_hqq(model: nn.Module, bits: int, group: int, batches: list[dict[str, Any]]) -> float:
    """torchao: the HQQ that its int4 config can ask for."""
    primitives: Any = importlib.import_module("torchao.quantization.quant_primitives")
    for layer in linears(model):
        weight = layer.weight.detach()
        q, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
            weight.float(), bits, group, axis=1, compute_dtype=torch.float32, device=str(weight.device), raw_output=True
        )
        blocks = q.float().view(weight.shape[0], -1, group)
        weight.copy_(((blocks - zero[..., None]) * scale[..., None]).view_as(weight))
    return bits + 32 / group


def llm_compressor_gptq(model: nn.Module, bits: int, group: int, batches: list[dict[str, Any]]) -> float:
    """llm-compressor: GPTQ with its defaults (activation order "static", damping 0.01), block by block."""
    entry: Any = importlib.import_module("llmcompressor")
    modifier: Any = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
    ids = torch.cat([batch["input_ids"] for batch in batches])
    samples: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    recipe = modifier(ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}})
    entry.oneshot(model=model, dataset=DataLoader(samples, batch_size=8), recipe=recipe)
    return bits + (16 + bits) / group


PEERS: dict[str, tuple[str, Peer]] = {
    "hqq": ("hqq", hqq),
    "torchao, HQQ": ("torchao", torchao_hqq),
    "llm-compressor, GPTQ": ("llmcompressor", llm_compressor_gptq),
}
"""Label -> package, and what it does."""


def main() -> None:
    args = parse_args()
    what = LanguageModel(args.model, args.dtype, args.device, args.window)
    text = what.windows(args.text, args.windows)
    batches = what.batches(what.windows(args.calibration, args.calibration_windows))
    original = what.load()
    base, _ = perplexity(original, text)
    run = run_of(args, what, base, text.shape[0] * (text.shape[1] - 1))
    rows: list[dict[str, Any]] = []
    for name in args.formats:
        spec: Any = format_of(name).weight((1024, 1024))  # type: ignore[union-attr]
        for label, (package, quantize) in PEERS.items():
            model, start = what.load(), (time.perf_counter(), time.process_time())
            try:
                run.setdefault("peers", {})[package] = importlib.metadata.version(package)
                bits = quantize(model, spec.bits, spec.block[1], batches)
            except Exception as error:  # whatever it raises is the reason why it does not run
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                print(f"{name} {label}: {why}", file=sys.stderr, flush=True)
                rows.append({"format": name, "recipe": label, "failed": why})
                continue
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            found, kl = perplexity(model, text, original if args.divergence else None)
            row = {"format": name, "recipe": label, "bits": bits, "perplexity": found, "divergence": kl, "notes": []}
            rows.append({**row, "seconds": spent[0], "cpu_seconds": spent[1]})
            print(f"{name:10} {label:24} {bits:.2f} bits {found:.3f}  {spent[1]:.0f} s", flush=True)
    if args.json is not None:
        add_to(args.json, run, rows)


if __name__ == "__main__":
    main()
