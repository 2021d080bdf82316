"""Quantize the unet of a diffusion pipeline while it loads, save the pipeline, and load it again.

python examples/diffusers_unet.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from diffusers import DDPMPipeline, DDPMScheduler, PipelineQuantizationConfig, UNet2DModel

from ao.integrations.diffusers import AoConfig


def tiny(folder: str) -> str:
    """A random pipeline."""
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
    return folder


def images(pipeline: DDPMPipeline) -> torch.Tensor:
    """Two steps from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipeline(num_inference_steps=2, generator=generator, output_type="np").images)


def main(arguments: list[str] | None = None) -> None:
    """See above."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        config = PipelineQuantizationConfig(quant_mapping={"unet": AoConfig("int8_weight_only")})
        pipeline = DDPMPipeline.from_pretrained(tiny(f"{folder}/tiny"), quantization_config=config)
        print(pipeline.unet.hf_quantizer.report)
        pipeline.save_pretrained(f"{folder}/int8")
        again = DDPMPipeline.from_pretrained(f"{folder}/int8")
        print("the same images after saving and loading:", torch.equal(images(pipeline), images(again)))


if __name__ == "__main__":
    main()
