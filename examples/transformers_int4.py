"""Load a language model in 4 bits, generate, save it, and load what was saved.

python examples/transformers_int4.py                      a tiny random Llama
python examples/transformers_int4.py --model DIR_OR_NAME  a model of yours
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ao
from ao.integrations.transformers import AoConfig


def tiny(folder: str) -> str:
    """A random Llama of two layers."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the Hub; by default a tiny random model")
    parser.add_argument("--device", help="a device, or auto; by default the CPU")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        name = options.model or tiny(f"{folder}/tiny")
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=AoConfig("int4_weight_only"), device_map=options.device
        )
        print(model.hf_quantizer.report)
        print(f"{ao.get_model_size_in_bytes(model) / 1e6:.1f} MB with what stays as it is")

        prompt = torch.arange(3, 11, device=model.device)[None]
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        print("generated", tokens[0, 8:].tolist())

        model.save_pretrained(f"{folder}/int4")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/int4", device_map=options.device)
        same = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        print("after saving and loading", same[0, 8:].tolist())
        assert torch.equal(same, tokens)


if __name__ == "__main__":
    main()
