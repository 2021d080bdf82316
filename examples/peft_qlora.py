"""QLoRA: train adapters over a model of 4 bits with an 8-bit optimizer, save them, merge them.

python examples/peft_qlora.py                      a tiny random Llama that learns to count
python examples/peft_qlora.py --model DIR_OR_NAME
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers_int4 import tiny

import ao
from ao.integrations.transformers import AoConfig
from ao.optim import AdamW8bit


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the Hub; by default a tiny random model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        name = options.model or tiny(f"{folder}/tiny")
        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=AoConfig("nf4_weight_only"))
        model = prepare_model_for_kbit_training(model)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        model.print_trainable_parameters()

        counting = [torch.arange(i, i + 16) % 200 + 3 for i in range(64)]
        trainer = Trainer(
            model,
            TrainingArguments(
                f"{folder}/run",
                max_steps=options.steps,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_steps=5,
                dataloader_pin_memory=torch.accelerator.is_available(),
            ),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in counting],
            optimizers=(AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=1e-2), None),
        )
        trainer.train()
        model.save_pretrained(f"{folder}/adapters")  # the adapters alone

        ids = counting[0][None].to(model.device)
        model.eval()
        with torch.no_grad():
            adapted = model(input_ids=ids).logits
            merged = model.merge_and_unload()  # plain layers, W + B A
            print(f"merged: {ao.compute_error(adapted, merged(input_ids=ids).logits):.0f} dB of the adapters' output")
            ao.quantize_(merged, ao.Int8WeightOnlyConfig())  # and small again, now with eight bits
            print(f"in int8: {ao.compute_error(adapted, merged(input_ids=ids).logits):.0f} dB")


if __name__ == "__main__":
    main()
