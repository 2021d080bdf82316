"""A report of what quantization did to a model, as one HTML page that needs nothing else: `LayerRecord`, `write_page`."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ao.dtypes import QTensor
from ao.dtypes.checkpoint import writing
from ao.quant import Report, compute_error

__all__ = ["LayerRecord", "Measure", "Page", "layer_record", "layer_records", "page_of", "page_text", "write_page"]


BINS = 64


@dataclass(frozen=True)
class LayerRecord:
    """One quantized parameter.

    sqnr: 20 log10(|w| / |w - q|) in dB; None where w = q.
    low, high: the ends of the histograms, the smallest and the largest weight.
    before, after: how many weights fall into each of 64 bins of equal width, before and after.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """A number before and after, such as Measure("perplexity", 11.55, 11.9). lower: whether less is better."""

    name: str
    before: float
    after: float
    unit: str = ""
    lower: bool = True


@dataclass
class Page:
    """What a report shows.

    title: of the model. subtitle: of the format.
    layers: the quantized parameters. skipped: full name -> why, of those that stay as they are. notes: sentences.
    measures: numbers before and after. facts: how they were measured, name -> text.
    """

    title: str
    subtitle: str
    layers: list[LayerRecord] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def layer_record(name: str, before: Tensor, after: Tensor) -> LayerRecord:
    """The record of a parameter: `before` in floating point, `after` as a QTensor, of one shape."""
    w = before.detach().float()
    q = after.detach()
    values = q.to(torch.float32).dequantize() if isinstance(q, QTensor) else q.float()
    error = compute_error(w, values).item() if not torch.equal(w, values) else None
    low, high = (w.min().item(), w.max().item()) if w.numel() else (0.0, 0.0)
    bytes_after = q.nbytes_packed if isinstance(q, QTensor) else q.nbytes
    form = repr(q.spec) if isinstance(q, QTensor) else str(q.dtype).removeprefix("torch.")
    counts = [_histogram(t, low, high) for t in (w, values)]
    return LayerRecord(name, tuple(w.shape), form, before.nbytes, bytes_after, error, low, high, *counts)


def layer_records(before: nn.Module | Mapping[str, Tensor], after: nn.Module) -> list[LayerRecord]:
    """The records of all parameters of `after` that are quantized. before: the model as it was, or its state dict."""
    state = before.state_dict() if isinstance(before, nn.Module) else before
    return [layer_record(n, state[n], p) for n, p in after.named_parameters() if isinstance(p, QTensor)]


def page_of(title: str, report: Report, records: Iterable[LayerRecord], measures: Iterable[Measure] = ()) -> Page:
    """The page of a call of `quantize_`, from the Report that it returned."""
    layers = list(records)
    formats = sorted({row.label for row in report.rows})
    subtitle = formats[0] if len(formats) == 1 else f"{len(formats)} formats"
    return Page(title, subtitle, layers, dict(report.skipped), list(report.notes), list(measures))


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`, in one piece: a file that was there is replaced at the end or not at all."""
    path = Path(path)
    text = page_text(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def page_text(page: Page) -> str:
    """The HTML text."""
    data: dict[str, Any] = asdict(page)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = files("ao.integrations").joinpath("html_report.html").read_text(encoding="utf-8")
    title = f"{page.title}, quantized".replace("&", "&amp;").replace("<", "&lt;")
    return template.replace("__TITLE__", title).replace("__DATA__", text)


def _histogram(values: Tensor, low: float, high: float) -> tuple[int, ...]:
    if not values.numel():
        return (0,) * BINS
    width = high - low or 1.0
    # Values beyond the ends count in the last bins: a quantized weight may lie a little outside.
    bins = ((values.flatten() - low) * (BINS / width)).long().clamp_(0, BINS - 1)
    return tuple(torch.bincount(bins, minlength=BINS).tolist())
