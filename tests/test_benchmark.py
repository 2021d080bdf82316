"""`benchmark_model`, what measurements are made of, and the compiler settings that users of other libraries expect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ao
from ao.inductor_config import SETTINGS
from ao.quant import benchmark


def test_benchmark_model_is_the_median_in_milliseconds(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.009, 2.0, 2.002])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls = []
    found = ao.benchmark_model(lambda *args, **kwargs: calls.append((args, kwargs)), 3, (1, 2), {"c": 3})
    assert found == pytest.approx(2.0)
    assert calls == [((1, 2), {"c": 3})] * 6  # three that do not count


def test_benchmark_model(device):
    model = nn.Linear(8, 8, device=device)
    x = torch.randn(2, 8, device=device)
    assert ao.benchmark_model(model, 2, (x,)) > 0
    assert ao.benchmark_model(model, 2, kwargs={"input": x}, device_type=device) > 0
    assert ao.benchmark_model(torch.relu, 1, [x]) > 0
    with pytest.raises(ValueError, match="num_runs must be at least 1, got 0"):
        ao.benchmark_model(model, 0, (x,))


def test_device_is_found():
    meta = nn.Linear(1, 1, device="meta")
    assert benchmark._device(meta, (), None).type == "meta"
    assert benchmark._device(meta, (), {"x": [torch.ones(1)]}).type == "cpu"
    assert benchmark._device(len, ("text",), None).type == "cpu"


def test_interleave(monkeypatch):
    said = []
    timers = {name: lambda name=name: said.append(name) or float(len(said)) for name in "abc"}
    samples = benchmark.interleave(timers, limit=0.0, least=3)
    assert "".join(said) == "abcbcacab"  # in each round another one is first
    assert samples == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert len(benchmark.interleave(timers, limit=1e9, most=4)["a"]) == 4
    assert benchmark.interleave({}, limit=0.0) == {}


def test_noise():
    assert benchmark.noise([2.0] * 9) == 0
    assert benchmark.noise([1.0, 2.0, 3.0, 2.0]) == pytest.approx(1.25 * 1.48 * 0.5 / 2 / 2)


def test_size_is_where_users_look():
    assert ao.get_model_size_in_bytes(nn.Linear(4, 4)) == 4 * (16 + 4)


def test_recommended_inductor_config_setter():
    """As a call it stays, as a context manager it puts back exactly what it found."""
    import torch._inductor.config as config

    odd = {"coordinate_descent_tuning": True, "fx_graph_cache": False, "triton.unique_kernel_names": False}
    with config.patch({**dict.fromkeys(SETTINGS, False), **odd}):
        before = config.save_config()
        with ao.recommended_inductor_config_setter() as setter:
            assert all(getattr(config, name) is value for name, value in SETTINGS.items())
            with ao.recommended_inductor_config_setter():
                pass
            assert all(getattr(config, name) is value for name, value in SETTINGS.items())
        assert config.save_config() == before
        with pytest.raises(KeyError), setter:  # again, and past an error
            assert config.coordinate_descent_check_all_directions
            raise KeyError
        assert config.save_config() == before
        ao.recommended_inductor_config_setter()
        assert all(getattr(config, name) is value for name, value in SETTINGS.items())


def test_settings_are_set_from_an_import_of_ao_alone():
    code = (
        "import sys, ao; assert 'torch._inductor.config' not in sys.modules; ao.recommended_inductor_config_setter();"
        "import torch._inductor.config as c; print(c.coordinate_descent_tuning, c.force_fuse_int_mm_with_mul)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert out.stdout.split() == ["True", "True"]
