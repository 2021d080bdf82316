"""The blocks of docs/serving.md: a server of transformers that is asked over HTTP, and many prompts at once."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")


PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
(_, SETUP), *BLOCKS_AFTER = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE, re.S | re.M)
BLOCKS = {kind: "".join(block for each, block in BLOCKS_AFTER if each == kind) for kind in ("bash", "python")}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers."""
    for _ in range(600):
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def test_blocks(tmp_path, monkeypatch, capsys):
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason='needs pip install "transformers[serving]"')
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "serving"}
    exec(compile(SETUP, "docs/serving.md", "exec"), names)
    model = transformers.AutoModelForCausalLM.from_pretrained("llama-int4").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("llama-int4")
    port = free_port()
    command = shlex.split(BLOCKS["bash"].replace("8321", str(port)))
    assert command[0] == "python"
    with open("log", "wb") as log:
        server = subprocess.Popen([sys.executable, *command[1:]], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        exec(compile(BLOCKS["python"].replace("8321", str(port)), "docs/serving.md", "exec"), names)
    finally:
        server.terminate()
        server.wait()
    told, batch = capsys.readouterr().out.strip().splitlines()[-2:]
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert told.strip() == tokenizer.decode(written(model, ids)).strip() and told.strip()
    assert eval(batch) == [written(model, torch.tensor([ids])) for ids in ([3, 5, 7], [9, 8])]


def written(model, ids: torch.Tensor) -> list[int]:
    """Greedy tokens after a prompt."""
    return model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
