"""How many functions of ours, in how many files, a reader meets who follows one call. These numbers may only fall."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import ao
from ao.optim import AdamW8bit

ROOT = str(Path(ao.__file__).parent)


def journey(call: Callable[[], object]) -> tuple[set[tuple[str, str]], set[str]]:
    """The named functions of ours that `call` runs, and the files that they are in."""
    met: set[tuple[str, str]] = set()

    def note(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT) and not code.co_name.startswith("<"):
            met.add((code.co_filename, code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return met, {file for file, _ in met}


@pytest.mark.parametrize(
    ("config", "functions", "files"),
    [
        (ao.Int4WeightOnlyConfig, 45, 12),
        (ao.Int8WeightOnlyConfig, 43, 10),
        (ao.Float8WeightOnlyConfig, 41, 10),
        (ao.Int8DynamicActivationInt8WeightConfig, 45, 10),
        (ao.NF4WeightOnlyConfig, 64, 12),
    ],
)
def test_quantize_one_layer(config, functions, files):
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 256)).bfloat16()

    ao.quantize_(layer(), config())  # what is remembered of a shape
    model = layer()
    met, where = journey(lambda: ao.quantize_(model, config()))
    assert 20 < len(met) <= functions and len(where) <= files, sorted(met)


def test_a_recipe_is_parsed_once_and_a_shape_asked_once(monkeypatch):
    from ao.quant import config as configs

    parsed, chosen = [], []
    parse, choose = configs.parse_recipe, ao.Intx.choose_qparams
    monkeypatch.setattr(configs, "parse_recipe", lambda *args: parsed.append(args) or parse(*args))
    monkeypatch.setattr(ao.Intx, "choose_qparams", lambda *args: chosen.append(args) or choose(*args))
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(88, 104) for _ in range(5)])
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert len(parsed) == 1 and len(chosen) <= 2  # to see whether the shape fits, and for layers on meta
    weights = [layer.weight for layer in model]
    assert all(w.qdata.is_meta and w.scale.shape == (104, 1) for w in weights)
    assert len({id(w.qdata) for w in weights}) == 5  # each has its own


def test_a_step_of_an_optimizer():
    params = [nn.Parameter(torch.randn(64, 256)), nn.Parameter(torch.randn(64))]
    optimizer = AdamW8bit(params, compile=False)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()  # what is found once
    met, where = journey(optimizer.step)
    assert 20 < len(met) <= 39 and len(where) <= 9, sorted(met)
