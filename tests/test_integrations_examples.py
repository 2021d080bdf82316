"""The examples run, and say what they should."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

NEEDS = {
    "transformers_int4": ["transformers"],
    "peft_qlora": ["peft", "accelerate"],
    "diffusers_unet": ["diffusers"],
}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))


def run(name: str, capsys, *arguments: str) -> str:
    for module in NEEDS.get(name, []):
        pytest.importorskip(module, reason=f"the example needs {module}")
    importlib.import_module(name).main(list(arguments))
    assert sys.modules[name].__doc__
    out: str = capsys.readouterr().out
    return out


def test_transformers_int4(capsys):
    out = run("transformers_int4", capsys)
    assert "Intx(bits=4, block=(1, 128), signed=False)" in out
    tokens = [line.partition("[")[2] for line in out.splitlines() if "[" in line and not line.startswith("Intx")]
    assert len(tokens) == 2 and tokens[0] == tokens[1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_qlora(capsys, monkeypatch):
    monkeypatch.setattr("ao.optim.kernel.has_compiler", lambda kind: False)  # a few steps, not worth compiling for
    out = run("peft_qlora", capsys, "--steps", "3")
    merged = next(line for line in out.splitlines() if line.startswith("merged"))
    assert float(merged.split()[1]) > 80


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
def test_export_aoti(capsys):
    assert float(run("export_aoti", capsys).split()[-1]) < 1e-5


def test_diffusers_unet(capsys):
    assert "the same images after saving and loading: True" in run("diffusers_unet", capsys)
