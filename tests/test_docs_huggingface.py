"""The snippets of docs/huggingface.md, one after the other, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ao.quant.autoquant import end_to_end, timing

transformers = pytest.importorskip("transformers", reason="needs transformers")

import hf_models  # noqa: E402

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
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
    hf_models.llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "tiny")
    ids = torch.arange(3, 13)
    names = {
        "name": str(tmp_path / "tiny"),
        "prompt": ids[None],
        "data": [{"input_ids": ids, "labels": ids}] * 8,
        "folder": str(tmp_path / "unet"),
    }
    assert len(SNIPPETS) == 9
    for snippet in SNIPPETS:
        if "diffusers" in snippet:
            diffusers = pytest.importorskip("diffusers", reason="the page uses diffusers")
            diffusers.UNet2DConditionModel(
                sample_size=8, layers_per_block=1, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
            ).save_pretrained(names["folder"])  # fmt: skip
        exec(compile(snippet, "docs/huggingface.md", "exec"), names)
