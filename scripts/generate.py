"""Generate text with a Llama model in one format after the other, and print what each one costs.

The model is a local Hugging Face folder (--model DIR), or random weights of a known shape (--shape). Per format: tokens per
second of prefill and decode, how much of the memory bandwidth decode uses, bytes of the model, peak memory, seconds to
quantize and to compile. All formats that fit together in memory are measured in turns; --one-by-one frees each before the
next.

Decode is one token per sequence at a time, with a cache of fixed length. How it is compiled:

    (default)    torch.compile(step, mode=...) over the whole model; a minute for the 8B shape
    --regional   one block is compiled and shared by all layers, in seconds, and so is the head
    --capture    the decode step is recorded in one CUDA graph here, rather than by mode="reduce-overhead", whose checks in
                 Python run at each token; --regional does that too

Of bandwidth: (bytes of all weights but an untied embedding, and of the whole cache) * steps per second, over the bandwidth
of a copy or a sum in the same run.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import formats
import measure
import torch
from bench_linear import reason
from demo import Progress
from llama import SHAPES, Block, Llama, LlamaConfig, load_model, random_model
from performance import against_bf16, read
from torch import Tensor, nn

import ao
from ao.quant.kv_cache import kv_cache_config


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=formats.help_text(),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="a local Hugging Face folder of a Llama model")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many blocks")
    parser.add_argument("--format", "--formats", dest="formats", nargs="+", default=["bf16", "int8"], metavar="F")
    parser.add_argument("--quantize-embedding", nargs="?", const="int8", metavar="F", help="to F; default int8")
    parser.add_argument(
        "--quantize-head", nargs="?", const="same", metavar="F", help="to F; default as the other layers"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="needs --model; default: random tokens")
    parser.add_argument("--prompt-length", type=int, default=128, metavar="T", help="of random tokens; default: 128")
    parser.add_argument(
        "--kv-cache", default="bf16", metavar="C", help="bf16, or int8, int4, kivi4, ...; default: bf16"
    )
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens that the cache holds; the random prompt fills it"
    )
    parser.add_argument(
        "--prompt-chunk", type=int, default=2048, metavar="T", help="tokens of a prompt at a time; default: 2048"
    )
    parser.add_argument("--new-tokens", type=int, default=200, metavar="T", help="default: 200; 0 only quantizes")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--threads", type=int, metavar="T", help="threads on a CPU; default: PyTorch's")
    parser.add_argument(
        "--compile-mode",
        choices=["none", "default", "reduce-overhead", "max-autotune"],
        help="of torch.compile; default: reduce-overhead, on a CPU default",
    )
    parser.add_argument("--regional", action="store_true", help="compile one block for all layers")
    parser.add_argument("--capture", action="store_true", help="one CUDA graph, recorded here")
    parser.add_argument("--compile-prefill", action="store_true", help="the whole model once more, for the prompt")
    parser.add_argument("--one-by-one", action="store_true", help="one model in memory at a time")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="of which the median counts; default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save there, beside runs of other settings")
    args = parser.parse_args(argv)
    cpu = torch.device(args.device).type == "cpu"
    args.compile_mode = args.compile_mode or ("default" if cpu else "reduce-overhead")
    args.capture = (args.capture or args.regional) and not cpu
    if (args.capture or args.regional) and args.compile_mode == "none":
        parser.error("--capture and --regional need a --compile-mode other than none")
    if args.prompt is not None and args.model is None:
        parser.error("--prompt needs --model DIR, whose tokenizer.json reads it")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"{args.model} has no config.json; --model takes a Hugging Face folder")
    if args.context is not None:
        args.prompt_length = args.context - args.new_tokens
        if args.prompt_length < 1:
            parser.error("--context must be longer than --new-tokens")
    try:
        args.quantized = None if args.kv_cache == "bf16" else args.kv_cache
        if args.quantized is not None:
            kv_cache_config(args.quantized)
    except ValueError as error:
        parser.error(str(error))
    if args.new_tokens == 1:
        parser.error("--new-tokens must be 2 or more, so that there is a decode step, or 0 to only quantize")
    try:
        args.config = SHAPES[args.shape] if args.shape else LlamaConfig.from_hf(hf_config(args.model))
        for name in [*args.formats, args.quantize_embedding, args.quantize_head]:
            if name not in (None, "same"):
                formats.config_of(name)
    except ValueError as error:
        parser.error(str(error))
    return args


def hf_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder."""
    return json.loads((folder / "config.json").read_text())


def sample(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """The next tokens (B, 1) of logits (B, vocab): the likeliest, or one drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # The argmax of p / e with e exponential is distributed as p, and needs no transfer to the host.
    noise = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1, keepdim=True)


def next_tokens(model: Llama, ids: Tensor, positions: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """The tokens (B, 1) that follow ids (B, S)."""
    return sample(model(ids, positions, last=True)[:, -1], temperature, top_k)


def call_block(block: Block, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What --regional compiles."""
    return Block.forward(block, *inputs)


def call_finish(model: Llama, x: Tensor) -> Tensor:
    """The same, of the head."""
    return Llama.finish(model, x)


@dataclass
class Generator:
    """A model in one format, ready to generate; `row` is what gets reported."""

    model: Llama
    row: dict[str, Any]
    prompt: Tensor
    new_tokens: int
    prefill: Callable[..., Tensor]
    step: Callable[..., Tensor]
    kv_cache: str | None = None
    chunk: int = 2048
    graph: torch.cuda.CUDAGraph | None = None
    read_s: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch, length = self.prompt.shape
        self.model.make_cache(batch, length + self.new_tokens, self.kv_cache)
        device = self.prompt.device
        self.start = torch.arange(length, device=device)
        self.tokens = torch.zeros(batch, length + self.new_tokens, dtype=torch.int64, device=device)
        self.tokens[:, :length] = self.prompt
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)

    def first(self) -> None:
        """Read the prompt, and make the first token."""
        self.position.fill_(self.prompt.shape[1])
        for at in range(0, self.prompt.shape[1], self.chunk):
            self.model.start_at(at)
            part = slice(at, at + self.chunk)
            token = self.prefill(self.prompt[:, part], self.start[part])
        self.token.copy_(token)
        self.tokens.index_copy_(1, self.position, self.token)

    def advance(self) -> None:
        """Make one more token. All of it happens on the device, in place."""
        torch.compiler.cudagraph_mark_step_begin()
        self.token.copy_(self.step(self.token, self.position))
        self.position.add_(1)
        self.tokens.index_copy_(1, self.position, self.token)

    def compile(self, capture: bool) -> float:
        """Run everything for the first times. Returns seconds, with those of reading the prompt."""
        device = self.prompt.device
        start = time.perf_counter()
        self.first()
        measure.synchronize(device)
        self.read_s = time.perf_counter() - start
        for _ in range(min(3, self.new_tokens - 1)):  # CUDA graphs of PyTorch's own are there from the third call on
            self.advance()
        measure.synchronize(device)
        if capture:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.advance()
        return time.perf_counter() - start

    def generate(self) -> None:
        """The whole text once, timed."""
        device = self.prompt.device
        measure.synchronize(device)
        start = time.perf_counter()
        self.first()
        measure.synchronize(device)
        middle = time.perf_counter()
        advance = self.advance if self.graph is None else self.graph.replay
        for _ in range(self.new_tokens - 1):
            advance()
        measure.synchronize(device)
        self.prefill_s.append(middle - start)
        self.decode_s.append(time.perf_counter() - middle)

    def report(self, ceiling: dict[str, float]) -> None:
        """Fill in the row."""
        batch, length = self.prompt.shape
        prefill, decode = statistics.median(self.prefill_s), statistics.median(self.decode_s)
        steps = (self.new_tokens - 1) / decode
        self.row |= {
            "prefill_ms": prefill * 1e3,
            "prefill_tokens_per_s": batch * length / prefill,
            "decode_tokens_per_s": batch * steps,
            "decode_ms_per_step": 1e3 / steps,
            "bandwidth_fraction": self.row["bytes_per_step"] * steps / measure.bandwidth(ceiling),
        }


@torch.no_grad()
def build(args: argparse.Namespace, name: str, prompt: Tensor, compiler: dict[str, Any]) -> Generator:
    """Load, quantize and compile the model in the format `name`."""
    device = torch.device(args.device)
    before = measure.used_bytes(device)
    dtype = formats.PLAIN.get(name, torch.bfloat16)
    if args.model:
        model = load_model(args.model, device, dtype, args.layers)
    else:
        config = replace(args.config, layers=min(args.layers or args.config.layers, args.config.layers))
        model = random_model(config, device, dtype, args.seed)
    row = {"format": name, **quantize(model, name, args)}
    skipped = [] if model.config.tied else [model.embed.weight]
    read_bytes = sum(size(p) for p in model.parameters() if all(p is not s for s in skipped))
    sequences, length = prompt.shape
    if not args.new_tokens:
        return Generator(model, row, prompt, 0, model, model)
    measure.reset_peak(device)
    prefill: Callable[..., Tensor]
    step: Callable[..., Tensor]
    prefill = step = functools.partial(next_tokens, temperature=args.temperature, top_k=args.top_k)
    if args.regional:
        regional(model, name, compiler, whole_prompt=length <= args.prompt_chunk)
    elif args.compile_mode != "none":
        step = torch.compile(measure.own_code(next_tokens, f"decode_{name}"), fullgraph=True, **compiler)
        step = functools.partial(step, temperature=args.temperature, top_k=args.top_k)
        if args.compile_prefill:
            whole = torch.compile(measure.own_code(next_tokens, f"prefill_{name}"), fullgraph=True)
            prefill = functools.partial(whole, temperature=args.temperature, top_k=args.top_k)
    generator = Generator(
        model, row, prompt, args.new_tokens, functools.partial(prefill, model), functools.partial(step, model), args.quantized,
        args.prompt_chunk,
    )  # fmt: skip
    hits = cache_hits()
    first_s = generator.compile(args.capture)
    row["compile_cache_hits"] = cache_hits() - hits
    if length <= args.prompt_chunk:  # a longer one is read as it was the first time: nothing of that was compiled
        torch.manual_seed(args.seed)
        generator.generate()
        generator.read_s = generator.prefill_s[0]
        generator.prefill_s.clear()
        generator.decode_s.clear()
    row["compile_s"] = max(first_s - generator.read_s, 0.0)
    if device.type == "cuda" or args.one_by_one or len(args.formats) == 1:
        row["peak_bytes"] = measure.used_bytes(device, peak=True) - before
    blocks: Any = model.blocks
    width = 2 * model.config.layers * model.config.kv_heads * model.config.head_dim
    plain = sequences * (length + args.new_tokens) * width * dtype.itemsize
    row["cache_bytes"] = (
        plain if args.quantized is None else sum(block.attention.cache.nbytes_packed for block in blocks)
    )
    row["bytes_per_step"] = read_bytes + row["cache_bytes"]
    return generator


def quantize(model: Llama, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize in place, and tell how fast it was and what it took: the columns of a row."""
    tied, device = model.config.tied, model.embed.weight.device
    parts: list[tuple[str, set[str]]] = []
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    head = name if args.quantize_head == "same" else args.quantize_head
    if name not in formats.PLAIN:
        parts.append((name, linear))
        if tied:
            both = {head, args.quantize_embedding} - {None}
            if len(both) > 1:
                raise ValueError(
                    f"head and embedding are tied and cannot be {head} and {args.quantize_embedding}; give one format"
                )
            parts += [(str(f), {"head", "embed"}) for f in both]
        else:
            parts += [(head, {"head"})] if head else []
            parts += [(args.quantize_embedding, {"embed"})] if args.quantize_embedding else []
    measure.synchronize(device)
    gc.collect()
    before = measure.used_bytes(device)
    measure.reset_peak(device)
    start = time.perf_counter()
    rows = []
    for each, names in parts:
        config = formats.config_of(each)
        if config is not None:
            rows += ao.quantize_(model, config, lambda module, fqn, names=names: fqn in names).rows  # type: ignore[misc]
    measure.synchronize(device)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"model_bytes": sum(size(p) for p in model.parameters())}
    if rows:
        found |= {
            "quantize_s": seconds,
            "quantize_bytes": sum(r.bytes_before + r.bytes_after for r in rows),
            "largest_layer_bytes": max(r.bytes_before for r in rows),
            "quantize_extra_bytes": max(measure.used_bytes(device, peak=True) - before, 0),
        }
        if device.type != "cuda" and found["largest_layer_bytes"] < 2**24:
            found["quantize_extra_bytes"] = None  # what a process holds is too coarse a measure
    return found


def regional(model: Llama, name: str, compiler: dict[str, Any], whole_prompt: bool) -> None:
    """Compile one block, for all blocks, and the head.

    whole_prompt: for a prompt too, which then comes at once. Of chunks every position would be another graph.
    """
    block = torch.compile(measure.own_code(call_block, name), fullgraph=True, **compiler)

    def forward(each: Any, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        run = block if whole_prompt or x.shape[1] == 1 else call_block
        return run(each, x, *more)

    for each in model.blocks:
        setattr(each, "forward", functools.partial(forward, each))  # noqa: B010
    finish = torch.compile(measure.own_code(call_finish, name), fullgraph=True, **compiler)
    setattr(model, "finish", functools.partial(finish, model))  # noqa: B010


def size(p: Tensor) -> int:
    """Bytes that a parameter stores."""
    return p.nbytes_packed if isinstance(p, ao.QTensor) else p.nbytes


def cache_hits() -> int:
    """Graphs that came from the compiler's cache on disk."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"])


def prompt_of(args: argparse.Namespace) -> tuple[Tensor, Any]:
    """Token ids (B, T), and the tokenizer or None."""
    if args.prompt is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        ids = torch.tensor([tokenizer.encode(args.prompt).ids])
        if not ids.numel():
            raise SystemExit("error: --prompt has no tokens")
    else:
        tokenizer = None
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(args.config.vocab, (1, args.prompt_length), generator=generator)
    return ids.repeat(args.batch, 1).to(args.device), tokenizer


def compiler_options(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What torch.compile gets, and how that reads in a table."""
    mode = args.compile_mode
    if mode == "none":
        return {}, "eager"
    if args.capture or args.regional:
        mode = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)
    what = "one block and the head compiled" if args.regional else "decode step compiled"
    how = f"{what}, mode {mode}" + (", in one CUDA graph" if args.capture else "")
    if args.compile_prefill and not args.regional:
        how += "; prefill compiled"
    return {} if mode == "default" else {"mode": mode}, how


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print, save. Returns the rows."""
    device = torch.device(args.device)
    if device.type == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    compiler, how = compiler_options(args)
    prompt, tokenizer = prompt_of(args)
    progress = Progress(2 * len(args.formats) + 1)
    with progress.during("ceilings of the machine"):
        if args.compile_mode != "none" and args.new_tokens:
            measure.start_compiler(device)
        ceiling = measure.ceilings(device)
    facts = measure.facts(device)
    progress.done(f"{facts['device']}, torch {facts['torch']}: {measure.bandwidth(ceiling) / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    layers = 0
    for group in [[name] for name in args.formats] if args.one_by_one else [args.formats]:
        generators = []
        for name in group:
            with progress.during(f"{name}: load, quantize, compile"):
                try:
                    generator = build(args, name, prompt, compiler)
                except (FileNotFoundError, ImportError) as error:
                    raise SystemExit(f"error: {error}") from None
                except Exception as error:
                    rows.append({"format": name, "failed": reason(error)})
                    progress.done(f"{name}: fails: {reason(error)}")
                    continue
            generators.append(generator)
            rows.append(generator.row)
            layers = generator.model.config.layers
            progress.done(f"{name}: {built(generator.row)}")
        with progress.during("generate, in turns"):
            for _ in range(args.repeats if args.new_tokens else 0):
                for generator in generators:
                    torch.manual_seed(args.seed)
                    with torch.no_grad():
                        generator.generate()
        for generator in generators:
            if args.new_tokens:
                generator.report(ceiling)
                progress.done(f"{generator.row['format']}: {spoken(generator, tokenizer)}")
        generator = None  # type: ignore[assignment]
        generators.clear()
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    settings = {
        "model": args.shape or args.model.resolve().name,
        "layers": layers,
        "batch": args.batch,
        "prompt_length": prompt.shape[1],
        "kv_cache": args.kv_cache,
        "new_tokens": args.new_tokens,
        "how": how,
        "quantize_embedding": args.quantize_embedding,
        "quantize_head": args.quantize_head,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "repeats": args.repeats,
    }
    run = {**facts, "ceilings": ceiling, "settings": settings, "rows": rows}
    show(run)
    if args.json:
        runs = [r for r in read(args.json)["runs"] if (r["device"], r["settings"]) != (facts["device"], settings)]
        measure.write_json(args.json, {"runs": [*runs, run]})
    return rows


def built(row: dict[str, Any]) -> str:
    """What is known before it generates."""
    parts = [f"{row['model_bytes'] / 1e9:.3f} GB"]
    if "quantize_s" in row:
        rate = row["quantize_bytes"] / row["quantize_s"] / 1e9
        extra = row["quantize_extra_bytes"]
        more = "" if extra is None else f", extra memory {extra / row['largest_layer_bytes']:.2f} largest layers"
        parts.append(f"quantized in {row['quantize_s']:.2f} s ({rate:.1f} GB/s{more})")
    if "compile_s" in row:
        cached = f" ({row['compile_cache_hits']} graphs from the cache)" if row["compile_cache_hits"] else ""
        parts.append(f"compiled in {row['compile_s']:.1f} s{cached}")
    return ", ".join(parts)


def spoken(generator: Generator, tokenizer: Any) -> str:
    """Speed, and the text where there is any."""
    row = generator.row
    line = (
        f"{row['decode_tokens_per_s']:.1f} tokens/s ({row['decode_ms_per_step']:.2f} ms a step, "
        f"{row['bandwidth_fraction']:.0%} of bandwidth), prefill {row['prefill_tokens_per_s']:,.0f} tokens/s"
    )
    if tokenizer is None:
        return line
    ids = generator.tokens[0].tolist()
    end = [i for i in range(generator.prompt.shape[1], len(ids)) if ids[i] in generator.model.config.end]
    return f"{line}\n{tokenizer.decode(ids[: end[0] if end else None])}\n"


def show(run: dict[str, Any]) -> None:
    """Print the table."""
    body = []
    for r in run["rows"]:
        if "failed" in r:
            body.append([r["format"], r["failed"][:60], *["-"] * 8])
            continue
        speed = against_bf16(run, r["format"], "decode_tokens_per_s")
        cells = [r["format"], f"{r['model_bytes'] / 1e9:.3f}"]
        if "decode_tokens_per_s" in r:
            cells += [
                f"{r['decode_tokens_per_s']:.1f}",
                f"{speed:.2f}x" if speed else "-",
                f"{r['bandwidth_fraction']:.0%}",
            ]
            peak = f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else "-"
            cells += [f"{r['prefill_tokens_per_s']:,.0f}", peak, f"{r['compile_s']:.1f}"]
        else:
            cells += ["-"] * 6
        fast = "quantize_s" in r
        cells += (
            [f"{r['quantize_s']:.2f}", f"{r['quantize_bytes'] / r['quantize_s'] / 1e9:.1f}"] if fast else ["-", "-"]
        )
        body.append(cells)
    s = run["settings"]
    head = ["format", "model GB", "decode tok/s", "of bf16", "of bandwidth", "prefill tok/s", "peak GB", "compile s"]
    head += ["quantize s", "GB/s"]
    title = f"{s['model']}, {s['layers']} layers, batch {s['batch']}, {s['prompt_length']} + {s['new_tokens']} tokens"
    title += f", {s['kv_cache']} cache" * (s.get("kv_cache", "bf16") != "bf16")
    measure.show(head, body, f"{title}; {s['how']}")


if __name__ == "__main__":
    try:
        main(parse())
    except KeyboardInterrupt:
        sys.exit(130)
