"""The snippets of docs/huggingface.md, as they stand, one after the other; autoquant's timers are replaced."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ao.quant.autoquant import end_to_end, timing

pytest.importorskip("transformers", reason="needs transformers")

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_snippets(tmp_path, monkeypatch):
    for module in ("peft", "accelerate", "onnxscript"):
        pytest.importorskip(module, reason=f"the page uses {module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        timing,
        "time_products",
        lambda p, rows, variants, *args: {n: 1.0 - 0.5 * ("Int8" in n) for n in variants},
    )

    def compare(model, calls, devices, before, after):
        after()
        return end_to_end.Comparison(2.0, 1.0, 0.01)

    monkeypatch.setattr(end_to_end, "compare", compare)
    names: dict[str, object] = {}
    for snippet in SNIPPETS:
        if "diffusers" in snippet and importlib.util.find_spec("diffusers") is None:
            continue
        exec(compile(snippet, "docs/huggingface.md", "exec"), names)


@pytest.mark.slow
def test_lines_of_bash(tmp_path):
    """They run what the block before them has written."""
    pytest.importorskip("accelerate", reason="the page uses accelerate")
    written = next(snippet for snippet in SNIPPETS if 'Path("train.py")' in snippet)
    root = Path(__file__).parent.parent
    env = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run([sys.executable, "-c", written], check=True, cwd=tmp_path)
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    ran = subprocess.run(["bash", "-ec", lines], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "LowPrecisionLinear" in ran.stdout, ran.stderr
