"""diffusers: a unet, a transformer and a pipeline, quantized as they load, saved, and loaded again."""

from __future__ import annotations

import json

import pytest
import torch

import ao

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'ao-lowbit[diffusers]'")

from ao.integrations.diffusers import AoConfig  # noqa: E402

FORMATS = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int4": ao.Int4WeightOnlyConfig(group_size=16),
    "int3": ao.Intx(3, (1, 16)),
    "float8": ao.Float8WeightOnlyConfig(),
    "nf4": ao.NF4WeightOnlyConfig(block_size=16),
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
    "mixed": ao.FqnToConfig({"re:.*attn.*": ao.Intx(4, (1, 16)), "_default": ao.Int8WeightOnlyConfig()}),
}


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    text = torch.randn(1, 5, 32)
    return model, {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": text}


def transformer():
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "timestep": torch.ones(1)}
    text = {"encoder_hidden_states": torch.randn(1, 6, 32), "pooled_projections": torch.randn(1, 32)}
    return model, {"hidden_states": torch.randn(1, 16, 16), **ids, **text}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("build", [unet, transformer])
@torch.no_grad()
def test_load_save_reload(build, form, tmp_path):
    model, inputs = build()
    model.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")(**inputs).sample
    quantized = type(model).from_pretrained(tmp_path / "plain", quantization_config=AoConfig(FORMATS[form]))
    out = quantized(**inputs).sample
    assert ao.compute_error(plain, out) > 15 and not torch.equal(plain, out)
    assert len(quantized.hf_quantizer.report) > 20
    quantized.save_pretrained(tmp_path / "saved", max_shard_size="40KB" if form == "nf4" else "1GB")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs).sample, out)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["quant_method"] == "ao"
    assert sum(isinstance(p, ao.QTensor) for p in again.parameters()) == len(quantized.hf_quantizer.report)


def test_modules_to_not_convert_and_what_does_not_fit(tmp_path):
    model, _ = unet()
    model.save_pretrained(tmp_path)
    config = AoConfig(ao.Intx(8), modules_to_not_convert=["time_embedding", "mid_block"])
    quantized = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=config)
    names = {n for n, p in quantized.named_parameters() if isinstance(p, ao.QTensor)}
    assert names and not any("time_embedding" in n or n.startswith("mid_block") for n in names)
    assert "modules_to_not_convert" in quantized.hf_quantizer.report.skipped["time_embedding.linear_1.weight"]
    assert not any(isinstance(p, ao.QTensor) for p in quantized.dequantize().parameters())
    with pytest.raises(ValueError, match="is not a multiple of its block 48"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=AoConfig(ao.Intx(4, (1, 48))))
    with pytest.raises(ValueError, match="on the disk"):
        diffusers.UNet2DConditionModel.from_pretrained(
            tmp_path, quantization_config=AoConfig(ao.Intx(8)), device_map={"": "disk"}, offload_folder=tmp_path / "off"
        )


@pytest.mark.parametrize(
    "config",
    [
        lambda: diffusers.PipelineQuantizationConfig(quant_mapping={"unet": AoConfig("int8_weight_only")}),
        lambda: diffusers.PipelineQuantizationConfig(
            quant_backend="ao", quant_kwargs={"quant_type": "int8_weight_only"}, components_to_quantize="unet"
        ),
    ],
    ids=["mapping", "backend"],
)
def test_a_pipeline(config, tmp_path):
    model = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "plain")

    def images(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        return torch.tensor(pipeline(num_inference_steps=2, generator=g, output_type="np").images)

    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "plain", quantization_config=config())
    assert isinstance(pipeline.unet.down_blocks[1].attentions[0].to_q.weight, ao.QTensor)
    out = images(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(images(diffusers.DDPMPipeline.from_pretrained(tmp_path / "saved")), out)


@pytest.mark.parametrize("build", [unet, transformer])
@torch.no_grad()
def test_saving_what_was_quantized_in_place(build, tmp_path):
    model, inputs = build()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    model.save_pretrained(tmp_path / "saved")
    assert getattr(model, "hf_quantizer", None) is None and "quantization_config" not in model.config
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    assert {n: p.spec for n, p in again.named_parameters() if isinstance(p, ao.QTensor)} == {
        n: p.spec for n, p in model.named_parameters() if isinstance(p, ao.QTensor)
    }
    assert again.get_memory_footprint() == ao.get_model_size_in_bytes(again)
    # Plain again, by either way, it is saved as a plain model.
    for each in (again.dequantize(), ao.quant.dequantize_(type(model).from_pretrained(tmp_path / "saved"))):
        each.save_pretrained(tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        loaded = type(model).from_pretrained(tmp_path / "plain")
        assert not any(isinstance(p, ao.QTensor) for p in loaded.parameters())
