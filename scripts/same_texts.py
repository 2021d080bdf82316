"""How many tokens of greedy texts stay the same with quantized keys and values.

    .venv/bin/python scripts/same_texts.py --model DIR --text FILE... [--caches int8 ...]

A text parts from that of the model's own cache where two tokens are almost equally likely, and stays apart. How often that is
without any quantization, the row of transformers' other attention says ("eager" beside "sdpa"): the same formula over the same
cache, rounded in another order.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measure
import torch
from eval_lm import LanguageModel
from torch import Tensor

from ao.integrations.transformers import QuantizedCache
from ao.quant.kv_cache import kv_cache_config

FIRST = 8
"""Tokens that are counted on their own."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--caches", nargs="+", default=["int8"], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=200, metavar="N")
    parser.add_argument("--length", type=int, default=64, metavar="T", help="tokens of a prompt; default: 64")
    parser.add_argument("--new", type=int, default=32, metavar="T", help="tokens of a text; default: 32")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    for name in args.caches:
        kv_cache_config(name)
    return args


@torch.inference_mode()
def texts(model: Any, prompts: Tensor, new: int, cache: str | None = None) -> Tensor:
    """Greedy tokens, (prompts, new)."""
    out = []
    for ids in prompts.split(100):
        more = {} if cache is None else {"past_key_values": QuantizedCache(model.config, cache, ids.shape[1] + new)}
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, **more,
        )  # fmt: skip
        out.append(made[:, ids.shape[1] :])
    return torch.cat(out)


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    source = LanguageModel(args.model, args.dtype, args.device, args.length)
    model: Any = source.load()
    prompts = source.windows(args.text, args.prompts)
    own = texts(model, prompts, args.new)
    found = {name: texts(model, prompts, args.new, name) for name in args.caches}
    model.set_attn_implementation("eager")
    found = {"eager, own cache": texts(model, prompts, args.new), **found}
    rows = [
        {"cache": name, "first": float((t == own)[:, :FIRST].float().mean()), "all": float((t == own).float().mean())}
        for name, t in found.items()
    ]
    facts = {**measure.facts(device), "dtype": args.dtype, "prompts": len(prompts), "new": args.new}
    body = [[r["cache"], f"{r['first']:.1%}", f"{r['all']:.1%}"] for r in rows]
    measure.show(
        ["cache", f"first {FIRST} tokens", f"{args.new} tokens"],
        body,
        f"{facts['device']}, {args.dtype}, {len(prompts)} texts",
    )
    if args.json:
        measure.write_json(args.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
