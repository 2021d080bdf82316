"""bench_optim.py, train_lm.py and the page that is made of what they write, at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_optim  # noqa: E402
import measure  # noqa: E402
import optim_page  # noqa: E402
import train_lm  # noqa: E402

from ao.optim import cpu_step, kernel  # noqa: E402


@pytest.fixture
def eager(monkeypatch):
    """Optimizers that compile nothing."""
    monkeypatch.setattr(kernel, "has_compiler", lambda kind: False)
    monkeypatch.setattr(cpu_step, "cpu_step", lambda *args: None)
    monkeypatch.setattr(measure, "start_compiler", lambda device: None)
    monkeypatch.setattr(bench_optim, "copy_rate", lambda device: 1e10)


# bench_optim.py

BENCH = [
    "--device",
    "cpu",
    "--shape",
    "tiny",
    "--layers",
    "1",
    "--count",
    "20",
    "--rounds",
    "2",
    "--steps",
    "1",
    "--batch",
    "1",
]


def test_modes_write_what_the_page_shows(eager, tmp_path, monkeypatch):
    def broken(params, **more):
        raise RuntimeError("no kernel\nfor this chip")

    monkeypatch.setattr(bench_optim, "PEERS", {"broken": {"AdamW8bit": broken}})
    path = tmp_path / "optim-cpu.json"
    words = ["step", "tiny", "offload", *BENCH, "--json", str(path), "--trace", str(tmp_path / "trace.json")]
    args = bench_optim.parse(words)
    args.peers = ["broken"]
    monkeypatch.setattr(bench_optim, "parse", lambda argv: args)
    assert bench_optim.main(words) == 0
    data = json.loads(path.read_text())
    steps = {(r["optimizer"], r["library"], r["dtype"]): r for r in data["step"]["rows"]}
    ours, fused = steps["AdamW8bit", "ao", "bfloat16"], steps["AdamW fused", "torch", "bfloat16"]
    n = ours["parameters"]
    assert 2.03 * n < ours["state_bytes"] < 2.2 * n
    assert fused["state_bytes"] == 4 * n  # of the dtype of the weights
    assert ours["moved_bytes"] == 6 * n + 2 * ours["state_bytes"]
    assert ours["once_bytes"] == ours["moved_bytes"] + 2 * n
    assert ours["floor"] == pytest.approx(ours["moved_bytes"] / 1e10 / ours["seconds"])
    assert ours["of_fused"] == pytest.approx(ours["seconds"] / fused["seconds"])
    assert steps["AdamW8bit", "broken", "float32"]["failed"] == "RuntimeError: no kernel"
    assert all(r["tensors"] == 20 and r["of_foreach"] > 0 for r in data["tiny"]["rows"] if "failed" not in r)
    offload = {(r["variant"], r["accumulate"]): r for r in data["offload"]["rows"]}
    assert len(offload) == 6
    assert len({r["losses"][0] for r in offload.values() if r["accumulate"] == 1}) == 1  # the same training
    assert offload["CPUOffloadOptimizer", 8]["steps_seconds"] > 0
    assert json.loads((tmp_path / "trace-CPUOffloadOptimizer-1.json").read_text())["traceEvents"]
    for mode in ("step", "tiny", "offload"):
        assert "On " in optim_page.measured_table(mode, path.name, "x", tmp_path)
    assert str(tmp_path) not in path.read_text()


def test_a_mode_that_fails_leaves_the_file_and_the_others_alone(eager, tmp_path, monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("lost the device")

    path = tmp_path / "optim-cpu.json"
    path.write_text(json.dumps({"step": "old"}))
    monkeypatch.setitem(bench_optim.MODES, "step", fail)
    words = ["step", "tiny", *BENCH, "--dtype", "float32", "--optim", "AdamW", "--json", str(path)]
    assert bench_optim.main(words) == 1
    data = json.loads(path.read_text())
    assert data["step"] == "old"
    assert [r["optimizer"] for r in data["tiny"]["rows"]] == ["AdamW", "AdamW fused", "AdamW foreach"]
    assert "lost the device" in capsys.readouterr().err


def test_overlaps_of_a_trace():
    def event(kind, name, start, end):
        return {"ph": "X", "cat": kind, "name": name, "ts": 1e6 * start, "dur": 1e6 * (end - start)}

    found = bench_optim.overlaps(
        [
            event("kernel", "a", 0, 2),
            event("kernel", "b", 1, 4),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 3, 5),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 8, 10),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 20, 30),
            event("user_annotation", "Optimizer.step#AdamW.step", 2, 9),
            event("user_annotation", "Optimizer.step#CPUOffloadOptimizer.step", 0, 40),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found == {
        "kernels_seconds": pytest.approx(4),
        "copies_seconds": pytest.approx(4),
        "steps_seconds": pytest.approx(7),
        "copies_beside_kernels": pytest.approx(1 / 4),
        "copies_hidden": pytest.approx(3 / 4),
        "steps_beside_kernels": pytest.approx(2 / 7),
    }
    assert "copies_hidden" not in bench_optim.overlaps([])


# train_lm.py

TRAIN = [
    "--device", "cpu", "--threads", "1", "--dim", "32", "--heads", "2", "--layers", "1", "--length", "16", "--batch", "2",
    "--steps", "150", "--warmup", "10", "--checkpoint-every", "10", "--optim", "adamw8bit",
]  # fmt: skip


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_killed_run_ends_like_one_that_was_not(eager, threads, tmp_path):
    def words(name):
        return [*TRAIN, "--out", str(tmp_path / name)]

    # Without a C++ compiler, as the runs of this process.
    environment = {**os.environ, "CXX": "none", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, SCRIPTS / "train_lm.py", *words("killed")], env=environment)
    latest = tmp_path / "killed" / "adamw8bit" / "latest.json"
    end = time.monotonic() + 120
    while not latest.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -9
    at = json.loads(latest.read_text())["step"]
    assert 10 <= at < 150
    resumed = train_lm.main(train_lm.parse(words("killed")))
    straight = train_lm.main(train_lm.parse(words("straight")))
    assert resumed[0]["losses"] == straight[0]["losses"]
    assert len(resumed[0]["losses"]) == 150
    a, b = (
        torch.load(tmp_path / name / "adamw8bit" / "step-000150" / "rank-0.pt", weights_only=True)
        for name in ("killed", "straight")
    )
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items())
    quantized = 0
    for i, states in b["optimizer"]["state"].items():
        for name, value in states.items():
            other = a["optimizer"]["state"][i][name]
            if hasattr(value, "blocks"):
                quantized += 1
                pairs = [(getattr(t.blocks, field) for t in (value, other)) for field in ("qdata", "scale")]
                assert all(torch.equal(x, y) for x, y in pairs)
            else:
                assert torch.equal(value, other)
    assert quantized
    with pytest.raises(SystemExit, match="has a run with another lr"):
        train_lm.main(train_lm.parse([*words("killed"), "--lr", "1"]))


def test_losses_become_a_table(eager, threads, tmp_path):
    path = tmp_path / "optim-loss.json"
    words = [*TRAIN, "--out", str(tmp_path / "runs"), "--json", str(path), "--steps", "12"]
    rows = train_lm.main(train_lm.parse([*words, "--optim", "adamw", "adamw4bit"]))
    data = json.loads(path.read_text())["loss"]
    assert [row["run"] for row in data["rows"]] == ["adamw", "adamw4bit"]
    assert data["rows"][1]["change"] == pytest.approx(rows[1]["loss"] / rows[0]["loss"] - 1)
    assert len(data["rows"][0]["losses"]) == 3
    assert data["rows"][0]["losses"][0] == pytest.approx(sum(rows[0]["losses"][:5]) / 5, abs=1e-4)
    table = optim_page.measured_table("loss", path.name, "x", tmp_path)
    assert f"{rows[1]['loss']:.4f}" in table


@pytest.mark.parametrize("sparse", ["masks", "fake"])
def test_sparse_weights_are_trained(sparse, eager, threads, tmp_path):
    words = [*TRAIN, "--out", str(tmp_path), "--steps", "6", "--optim", "adamw"]
    (row,) = train_lm.main(train_lm.parse([*words, "--sparse", sparse]))
    (dense,) = train_lm.main(train_lm.parse(words))
    assert row["run"] == f"adamw-sparse-{sparse}" and row["losses"][0] != dense["losses"][0]


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"run": name, "losses": [3.0, 2.0, first], "every": 5} for name, first in (("adamw", 1.0), ("adamw8bit", 1.1))
    ]
    optim_page.draw(rows, tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_the_page_is_what_the_numbers_say():
    optim_page.main(check=True)
