"""A Hugging Face model folder on this machine: the model, and texts as windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .command_line.texts import read_texts

__all__ = ["calibration_batches", "load_model", "perplexity", "read_config", "read_texts", "skeleton", "token_windows"]


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises FileNotFoundError where there is none, ValueError for one that is no object."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return found


def skeleton(source: Path) -> Any:
    """The model of a folder on the meta device: names and shapes, no weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        if cls is None:
            return transformers.AutoModel.from_config(config)
        return cls(config)


def load_model(
    folder: Path, config: Any = None, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The model of a folder, in the class that its config names, for inference.

    config: a config or Spec of ao, by which it is quantized as it loads; None leaves it as it is stored.
    dtype: None keeps the dtype of the checkpoint.

    Raises FileNotFoundError for a folder without config.json.
    """
    from .transformers import AoConfig

    read_config(folder)

    cls = type(skeleton(folder))
    more = {} if config is None else {"quantization_config": AoConfig(config)}
    return cls.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True, **more).to(device).eval()


def token_windows(folder: Path, texts: Iterable[str], length: int, most: int | None = None) -> list[Tensor]:
    """Pieces of at most `length` token ids, (1, T) each: every text cut from its start. most: pieces in all.

    Raises FileNotFoundError for a folder without tokenizer.json, ValueError for texts of fewer than two tokens.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows: list[Tensor] = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        for start in range(0, len(ids) - 1, length):
            if most is not None and len(windows) == most:
                return windows
            window = ids[start : start + length]
            if len(window) > 1:
                windows.append(torch.tensor([window], dtype=torch.int64, device="cpu"))
    if not windows:
        raise ValueError("the texts have fewer than two tokens; give longer ones")
    return windows


def calibration_batches(folder: Path, texts: Iterable[str], length: int, most: int) -> list[dict[str, Any]]:
    """What a model of a folder is called with to calibrate: at most `most` windows, evenly spread over the texts.

    Raises what `token_windows` does.
    """
    windows = token_windows(folder, texts, length)
    chosen = [windows[i * len(windows) // most] for i in range(most)] if len(windows) > most else windows
    caches = {"use_cache": False} if skeleton(folder).can_generate() else {}
    return [{"input_ids": ids, **caches} for ids in chosen]


@torch.no_grad()
def perplexity(model: Any, windows: Iterable[Tensor], progress: Callable[[int], object] | None = None) -> float:
    """exp of the mean negative log-likelihood of every token after the first of its window.

    model: a causal language model of transformers. windows: (1, T) token ids each.
    progress: called with 1 after each window.
    """
    total, count = 0.0, 0
    for ids in windows:
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()  # (1, T - 1, vocab)
        total += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
        if progress is not None:
            progress(1)
    return float(torch.tensor(total / count, dtype=torch.float64, device="cpu").exp())
