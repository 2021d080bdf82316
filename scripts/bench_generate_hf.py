"""What a user of transformers gets: `from_pretrained` and `generate`, in one format after the other.

The model is a local folder (--model DIR), or random weights of a known shape (--shape), which are written to a folder first
so that loading is measured too. Per format and mode:

    load s        from_pretrained, from a folder that the operating system has read before
    first s       the first call of generate in this mode, with what it compiles
    tok/s         tokens per second of decoding, at each batch size, from the first new token to the last
    step ms       the median of the times between two tokens: without what a call of generate begins with
    ttft ms       the time to the first token after a prompt of so many tokens
    busy ms       what the GPU works for one token at the first batch size (not with --no-busy: after a long prompt its profile
                  takes minutes to read)
    host us       one call of one linear layer, on the host alone, for 1, 8 and 128 tokens (mode eager)

Modes: eager, and static, which is generate(cache_implementation="static"): transformers then compiles the decoding step itself.
cache:int8 is static with our quantized cache of that name. Formats of other libraries are given as LIBRARY:NAME:
bitsandbytes:nf4, bitsandbytes:int8, torchao:int4, torchao:int8, torchao:float8-dynamic, quanto:int4, quanto:int8.

Each format runs in a process of its own, one after the other; with --in-turns all stay, compile at the same time, and are then
timed in turns (without load s and first s, which the neighbours disturb). Prompts of more than 8,192 tokens are read 2,048 at a
time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import formats
import measure
import torch
from bench_linear import reason
from llama import SHAPES
from tables import markdown
from torch import Tensor, nn

from ao.quant.kv_cache import kv_cache_config

CACHE = "cache:"
LONG = 8192
"""Tokens of a prompt beyond which it is read in pieces: attention's mask takes the square of it."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_generate_hf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=formats.help_text(),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="DIR", help="a local folder that from_pretrained reads")
    source.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many blocks, of a --shape")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4-g128"], metavar="F")
    parser.add_argument("--modes", nargs="+", default=["eager", "static"], metavar="MODE", help="default: eager static")
    parser.add_argument("--in-turns", action="store_true", help="all formats stay in memory and are timed in turns")
    parser.add_argument("--profile", action="store_true", help="print what the GPU does for a token, kernel by kernel")
    parser.add_argument("--no-busy", action="store_true", help="leave busy ms out")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="B")
    parser.add_argument("--prompt-length", type=int, default=16, metavar="T", help="before decoding; default: 16")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="T", help="default: 64")
    parser.add_argument("--ttft", nargs="*", type=int, default=[128, 2048], metavar="T", help="lengths of prompts")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="of which the median counts; default: 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU")
    parser.add_argument("--threads", type=int, metavar="T", help="threads on a CPU; default: PyTorch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save there")
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more, so that there is a decoding step")
    try:
        for name in args.formats:
            if ":" not in name:
                formats.config_of(name)
        for mode in args.modes:
            if mode.startswith(CACHE):
                kv_cache_config(mode.removeprefix(CACHE))
            elif mode not in ("eager", "static"):
                raise ValueError(f"--modes takes eager, static and cache:NAME, got {mode!r}")
    except ValueError as error:
        parser.error(str(error))
    return args


def folder_of(args: argparse.Namespace, parent: Path) -> Path:
    """The folder of the model; one with random weights is made in `parent`."""
    if args.model is not None:
        return args.model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.dim, intermediate_size=shape.hidden, head_dim=shape.head_dim,
        num_hidden_layers=args.layers or shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * max(LONG, args.prompt_length), rms_norm_eps=shape.norm_eps, tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta, **dict(shape.rope_scaling or ())},
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(parent)
    return parent


def config_of(name: str) -> Any:
    """The quantization_config of a format; None for bf16. Raises ImportError where another library is missing."""
    library, _, kind = name.rpartition(":")
    if not library:
        from ao.integrations.transformers import AoConfig

        config = formats.config_of(name)
        return None if config is None else AoConfig(config)
    import transformers

    if library == "bitsandbytes":
        if kind == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
        )  # fmt: skip
    if library == "torchao":
        q: Any = import_module("torchao.quantization")

        configs: dict[str, Callable[[], Any]] = {
            "int4": lambda: q.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
            "int8": lambda: q.Int8WeightOnlyConfig(),
            "float8": lambda: q.Float8WeightOnlyConfig(),
            "float8-dynamic": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
        }
        return transformers.TorchAoConfig(configs[kind]())
    if library == "quanto":
        return transformers.QuantoConfig(weights=kind)
    raise ValueError(f"{name}: the libraries that this script knows are bitsandbytes, torchao and quanto")


class Bench:
    """One model on one device."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.args, self.device = args, torch.device(args.device)
        more = {} if (config := config_of(name)) is None else {"quantization_config": config}
        start = time.perf_counter()
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=args.device, **more
        ).eval()
        self.synchronize()
        self.load_s = time.perf_counter() - start
        self.vocab = self.model.config.vocab_size

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def generate(self, mode: str, batch: int, length: int, new: int) -> tuple[float, float]:
        """`new` tokens after `length` random ones: seconds, and tokens per second from the first new one to the last."""
        ids = torch.randint(1, self.vocab, (batch, length), device=self.device)
        more: dict[str, Any] = {"prefill_chunk_size": 2048} if length > LONG else {}
        if mode == "static":
            more["cache_implementation"] = "static"
        elif mode.startswith(CACHE):
            from ao.integrations.transformers import QuantizedCache

            most = max(length + new, self.args.prompt_length + self.args.new_tokens)  # another length compiles anew
            cache = QuantizedCache(self.model.config, mode.removeprefix(CACHE), max_cache_len=most)
            more["past_key_values"] = cache.initialize_for(self.model, batch)
        self.times = times = Times()
        self.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=times,
                **more,
            )
        self.synchronize()
        end = time.perf_counter()
        assert out.shape[1] == length + new
        return end - start, batch * (new - 1) / max(end - times.each[1], 1e-9)

    def decode(self, mode: str, batch: int) -> float:
        """Tokens per second."""
        return self.generate(mode, batch, self.args.prompt_length, self.args.new_tokens)[1]

    def step_ms(self) -> float:
        """Milliseconds between two tokens of the last call."""
        return self.times.step() * 1e3

    def first_token(self, mode: str, length: int) -> float:
        """Milliseconds to it."""
        return self.generate(mode, 1, length, 1)[0] * 1e3

    def busy_ms(self, mode: str, batch: int, new: int) -> float | None:
        """What the GPU works per token, milliseconds."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.generate(mode, batch, self.args.prompt_length, new)
        spans = [e for e in profile.key_averages() if e.device_type.name == "CUDA"]
        if self.args.profile:
            for e in sorted(spans, key=lambda e: -e.device_time_total)[:20]:
                print(f"{e.device_time_total / new:9.1f} us {e.count / new:7.1f} times  {e.key[:110]}")
        return sum(e.device_time_total for e in spans) / 1e3 / new

    def host_us(self, tokens: int) -> float:
        """One call of a linear layer in eager mode, microseconds on the host: the device is waited for outside."""
        layer: nn.Module = self.model.model.layers[0].self_attn.o_proj
        x = torch.randn(1, tokens, self.model.config.hidden_size, dtype=torch.bfloat16, device=self.device)
        times = []
        with torch.no_grad():
            for _ in range(30):
                layer(x)
            for _ in range(20):
                self.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    layer(x)
                times.append((time.perf_counter() - start) / 10)
        return statistics.median(times) * 1e6


class Times:
    """A streamer of `generate` that notes when tokens come: the prompt first."""

    def __init__(self) -> None:
        self.each: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.each.append(time.perf_counter())

    def step(self) -> float:
        """Seconds between two new tokens, the median."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.each[1:]))

    def end(self) -> None:
        pass


_held: list[Bench] = []


def load(folder: Path, name: str, args: argparse.Namespace) -> float:
    """Keep the model of a format in this process. Returns the seconds of from_pretrained."""
    if args.threads:
        torch.set_num_threads(args.threads)
    _held[:] = [Bench(folder, name, args)]
    return _held[0].load_s


def ask(method: str, *args: Any) -> Any:
    """A method of the model in this process."""
    return getattr(_held[0], method)(*args)


class Formats:
    """Some formats, each in a process of its own, timed in turns. `errors` has those that failed, which are out."""

    def __init__(self, folder: Path, names: Sequence[str], args: argparse.Namespace) -> None:
        self.args, self.errors = args, dict[str, str]()
        context = multiprocessing.get_context("spawn")
        self.pools = {name: ProcessPoolExecutor(1, context) for name in names}
        loaded = self.together(load, lambda name: (folder, name, args))
        self.load_s = loaded if len(names) == 1 else {}

    def together(
        self, call: Callable[..., Any], of: Callable[[str], tuple[Any, ...]], names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """`call` in the process of every format at the same time, by name."""
        at_work = {n: self.pools[n].submit(call, *of(n)) for n in names or list(self.pools)}
        found = {}
        for name, future in at_work.items():
            try:
                found[name] = future.result()
            except Exception as error:
                self.errors[name] = reason(error)
                print(f"{name}: {self.errors[name]}", file=sys.stderr)
                self.pools.pop(name).shutdown()
        return found

    def at_once(self, method: str, *args: Any) -> dict[str, Any]:
        return self.together(ask, lambda name: (method, *args))

    def medians(self, method: str, *args: Any) -> dict[str, float]:
        """Of some turns."""
        found: dict[str, list[float]] = {name: [] for name in self.pools}
        for _ in range(self.args.repeats):
            for name in list(self.pools):
                for one, value in self.together(ask, lambda _: (method, *args), [name]).items():
                    found[one].append(value)
        return {name: statistics.median(each) for name, each in found.items() if name in self.pools}

    def in_turn(self, method: str, *args: Any) -> dict[str, Any]:
        """Once each."""
        found: dict[str, Any] = {}
        for name in list(self.pools):
            found |= self.together(ask, lambda _: (method, *args), [name])
        return found

    def note(self, found: dict[str, dict[str, Any]], mode: str, key: str, values: dict[str, Any]) -> None:
        """Keep and show what was measured: a long run may be cut off."""
        found[key] = values
        print(mode, key, {name: round(v, 2) for name, v in values.items() if v is not None}, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """A row per format and mode."""
        args = self.args
        rows: list[dict[str, Any]] = []
        for mode in args.modes:
            found: dict[str, dict[str, Any]] = {"load_s": self.load_s} if self.load_s else {}
            alone = len(self.pools) == 1
            first = self.at_once("generate", mode, args.batch[0], args.prompt_length, args.new_tokens)
            if alone:
                found["first_s"] = {name: seconds for name, (seconds, _) in first.items()}
            for batch in args.batch:
                for _ in range(2):
                    self.at_once("decode", mode, batch)
                self.note(found, mode, f"tokens_s_{batch}", self.medians("decode", mode, batch))
                self.note(found, mode, f"step_ms_{batch}", self.in_turn("step_ms"))
                if batch == args.batch[0] and not args.no_busy:  # other lengths, which compile anew, come later
                    # Few tokens, since a profile takes long to read.
                    busy = self.in_turn("busy_ms", mode, batch, min(args.new_tokens, 17))
                    self.note(found, mode, "busy_ms", busy)
            for length in args.ttft:
                self.at_once("first_token", mode, length)
                self.note(found, mode, f"ttft_{length}_ms", self.medians("first_token", mode, length))
            if mode == "eager":
                for tokens in (1, 8, 128):
                    self.note(found, mode, f"host_{tokens}_us", self.in_turn("host_us", tokens))
            for name in self.pools:
                rows.append({"format": name, "mode": mode} | {key: each.get(name) for key, each in found.items()})
        for pool in self.pools.values():
            pool.shutdown()
        return rows


def table(rows: Sequence[dict[str, Any]], mode: str) -> str:
    """The rows of one mode; speeds in times of bf16's where that is there."""
    rows = [row for row in rows if row["mode"] == mode]
    base = next((row for row in rows if row["format"] == "bf16"), None)
    keys = [key for key in rows[0] if key not in ("format", "mode", "error") and rows[0][key] is not None]

    def cell(row: dict[str, Any], key: str) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        text = f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
        if base is None or base is row or base.get(key) is None:
            return text
        return f"{text} ({value / base[key]:.2f})"

    return markdown(["format", *keys], [[row["format"], *(cell(row, key) for key in keys)] for row in rows])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    rows: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as parent:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            folder = pool.submit(folder_of, args, Path(parent)).result()
        for names in [args.formats] if args.in_turns else [[name] for name in args.formats]:
            group = Formats(folder, names, args)
            rows += group.rows()
            errors |= group.errors
    for mode in args.modes:
        if any(row["mode"] == mode for row in rows):
            print(f"\n{mode}; in parentheses: times bf16's\n\n{table(rows, mode)}")
    if args.json is not None:
        facts = measure.facts(torch.device(args.device))
        facts["transformers"] = importlib.metadata.version("transformers")
        args.json.write_text(json.dumps({"runs": [facts], "rows": rows, "errors": errors}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
