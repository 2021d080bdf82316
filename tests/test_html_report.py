"""The HTML report: its numbers, and that no text of a model can break the page."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import ao
from ao.integrations.html_report import Measure, layer_record, layer_records, page_of, page_text, write_page


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1])


def test_a_page_has_the_numbers_of_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    report = ao.quantize_(model, ao.Intx(4, (1, 32)), lambda module, name: name == "0")
    page = page_of("a </script> model", report, layer_records(state, model), [Measure("perplexity", 10.0, 11.0)])
    write_page(page, tmp_path / "deep" / "report.html")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]
    text = (tmp_path / "deep" / "report.html").read_text()
    data = data_of(text)
    assert text.count("</script>") == 2 and data["title"] == "a </script> model"
    (layer,) = data["layers"]
    assert layer["name"] == "0.weight" and layer["shape"] == [32, 64]
    assert layer["bytes_before"] == 32 * 64 * 4 and layer["bytes_after"] == model[0].weight.nbytes_packed
    assert layer["sqnr"] == pytest.approx(ao.compute_error(state["0.weight"], model[0].weight.dequantize()).item())
    assert sum(layer["before"]) == sum(layer["after"]) == 32 * 64
    assert data["skipped"] == {"1.weight": "filter_fn leaves it out"}
    assert data["measures"][0]["after"] == 11.0


def test_records_of_odd_weights():
    exact = layer_record("w", torch.zeros(8, 32), ao.Intx(8, (1, 32)).quantize(torch.zeros(8, 32)))
    assert exact.sqnr is None and exact.before[0] == 256
    w = torch.randn(8, 32).bfloat16()
    record = layer_record("w", w, ao.Intx(2, (1, 32)).quantize(w))
    assert (record.low, record.high) == (w.min().item(), w.max().item())
    assert record.before == tuple(torch.histc(w.float(), 64, record.low, record.high).int().tolist())


def test_a_page_of_nothing():
    report = ao.quantize_(nn.Sequential(nn.ReLU()), ao.Int8WeightOnlyConfig())
    assert data_of(page_text(page_of("empty", report, [])))["layers"] == []
