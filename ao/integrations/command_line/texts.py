"""Texts to measure or to calibrate on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .arguments import check_readable


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Documents: of a `.json` file a list of strings, of any other file its text.

    Raises ValueError for a JSON file that holds something else, and for a file that is no text.
    """
    texts: list[str] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text) if path.suffix == ".json" else None
        except ValueError as error:
            raise ValueError(f"{path} is no {'JSON' if path.suffix == '.json' else 'UTF-8 text'}: {error}") from error
        if path.suffix != ".json":
            texts.append(text)
            continue
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError(f"{path} must hold a JSON list of strings")
        texts += found
    return texts


def check_texts(option: str, paths: Iterable[Path], folder: Path) -> list[str]:
    """The documents of files, for the tokenizer of a model folder.

    Raises OSError and ValueError for what cannot be read, and where no document has two tokens.
    """
    paths = list(paths)
    check_readable(option, paths)
    texts = read_texts(paths)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, which {option} needs: call tokenizer.save_pretrained({str(folder)!r})"
        )
    try:
        table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        whole = isinstance(table, dict) and "model" in table
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{folder / 'tokenizer.json'} holds no tokenizer; copy or save it again")
    if sum(map(len, texts)) < 1000:  # a longer text has more
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if not any(len(tokenizer.encode(text).ids) > 1 for text in texts):
            raise ValueError(f"{option} {' '.join(map(str, paths))} has fewer than two tokens; give a longer text")
    return texts
