"""Whole models of known shapes with random weights, and what one call of each is, for bench_models.py.

Vision encoders, diffusion transformers and UNets, speech, and language models. Each is built by the library that people load it
with (transformers, diffusers), on the device, from one seed, so that every process has the same weights and inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class WholeModel:
    """A model by its name.

    build: (small, layers) -> the module of its library, on the default device in the default dtype. small: a few narrow layers,
        for a test. layers: that many blocks, or None for all.
    inputs: (module, batch, small) -> the keyword arguments of a call, in float32 or integers.
    batches: what people run it with.
    unit: what one call does.
    part: what runs of that module, by its name; empty for the whole.
    decodes: a call is one step of `generate`, rather than `module(**inputs)`.
    compiled: the parts that are compiled: the whole module, or each of its blocks, which takes less time to compile where many
        are alike, as one graph serves all of these.
    quantized: (module, name) -> whether a format is for this layer; None for all that it takes.
    fuse: what our rungs do to the module besides giving it a format.
    """

    build: Callable[[bool, int | None], nn.Module]
    inputs: Callable[[Any, int, bool], dict[str, Tensor]]
    batches: tuple[int, ...]
    unit: str
    part: str = ""
    decodes: bool = False
    compiled: Callable[[Any], Iterable[nn.Module]] = lambda module: (module,)
    quantized: Callable[[nn.Module, str], bool] | None = None
    fuse: Callable[[nn.Module], object] = lambda module: None


def _sam(small: bool, layers: int | None) -> nn.Module:
    from transformers import SamConfig, SamModel, SamVisionConfig

    size: dict[str, Any] = {
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "mlp_dim": 5120,
        "image_size": 1024,
        "window_size": 14,
    }
    if small:
        size = {"hidden_size": 64, "num_attention_heads": 2, "mlp_dim": 128, "image_size": 128, "window_size": 4}
    depth = layers or (2 if small else 32)
    whole = sorted({depth * i // 4 - 1 for i in range(1, 5)} - {-1})
    encoder = SamVisionConfig(num_hidden_layers=depth, global_attn_indexes=whole, use_rel_pos=True, **size)
    return SamModel(SamConfig(vision_config=encoder.to_dict()))


def _fuse_positions(module: nn.Module) -> None:
    from ao.integrations.transformers import fuse_relative_positions

    fuse_relative_positions(module)


def _vit(small: bool, layers: int | None) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    size = _width(
        small, hidden_size=(1024, 64), intermediate_size=(4096, 128), num_attention_heads=(16, 2), image_size=(224, 64)
    )
    return ViTModel(
        ViTConfig(num_hidden_layers=layers or (2 if small else 24), patch_size=16, **size), add_pooling_layer=False
    )


def _dinov2(small: bool, layers: int | None) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    size = _width(small, hidden_size=(1024, 64), num_attention_heads=(16, 2), image_size=(518, 56))
    return Dinov2Model(Dinov2Config(num_hidden_layers=layers or (2 if small else 24), patch_size=14, **size))


def _sdxl(small: bool, layers: int | None) -> nn.Module:
    from diffusers import UNet2DConditionModel

    size: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    }  # fmt: skip
    if small:
        size = {
            "block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 64, "projection_class_embeddings_input_dim": 6 * 256 + 64, "sample_size": 16,
        }  # fmt: skip
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=256, use_linear_projection=True, **size,
    )  # fmt: skip


def _flux(small: bool, layers: int | None) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    size = _width(
        small, num_attention_heads=(24, 2), attention_head_dim=(128, 32), joint_attention_dim=(4096, 64),
        pooled_projection_dim=(768, 64),
    )  # fmt: skip
    return FluxTransformer2DModel(
        num_layers=layers or (1 if small else 19), num_single_layers=2 * layers if layers else (1 if small else 38),
        guidance_embeds=True, axes_dims_rope=(8, 12, 12) if small else (16, 56, 56), **size,
    )  # fmt: skip


def _whisper(small: bool, layers: int | None) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    size = _width(small, d_model=(1280, 64), encoder_ffn_dim=(5120, 128), decoder_ffn_dim=(5120, 128))
    heads = 2 if small else 20
    depth = layers or (2 if small else 32)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=51866, num_mel_bins=128, encoder_layers=depth, decoder_layers=depth, encoder_attention_heads=heads,
            decoder_attention_heads=heads, max_source_positions=100 if small else 1500, eos_token_id=None, pad_token_id=0,
            **size,
        )
    )  # fmt: skip


def _llama(small: bool, layers: int | None) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _width(
        small, vocab_size=(128256, 256), hidden_size=(4096, 64), intermediate_size=(14336, 128), num_attention_heads=(32, 2),
        num_key_value_heads=(8, 1),
    )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=layers or (2 if small else 32), eos_token_id=None, pad_token_id=0, **size)
    )


def _mixtral(small: bool, layers: int | None) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    size = _width(
        small, vocab_size=(32000, 256), hidden_size=(4096, 64), intermediate_size=(14336, 128), num_attention_heads=(32, 2),
        num_key_value_heads=(8, 1),
    )  # fmt: skip
    depth = layers or (2 if small else 8)
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=depth, eos_token_id=None, pad_token_id=0, **size))


def _width(small: bool, **sizes: tuple[int, int]) -> dict[str, Any]:
    return {name: of_test if small else full for name, (full, of_test) in sizes.items()}


def _image(module: Any, batch: int, small: bool) -> dict[str, Tensor]:
    size = module.config.image_size
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _sdxl_step(module: Any, batch: int, small: bool) -> dict[str, Any]:
    config = module.config
    text = config.projection_class_embeddings_input_dim - 6 * 256
    return {
        "sample": torch.randn(batch, 4, config.sample_size, config.sample_size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(batch, text), "time_ids": torch.ones(batch, 6)},
    }


def _flux_step(module: Any, batch: int, small: bool) -> dict[str, Any]:
    config, side, words = module.config, 4 if small else 64, 8 if small else 512
    at = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return {
        "hidden_states": torch.randn(batch, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, words, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),  # a thousand times that is exact in bfloat16, of 3.5 it is not
        "img_ids": at,
        "txt_ids": torch.zeros(words, 3),
    }


def _speech(module: Any, batch: int, small: bool) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 128, 2 * module.config.max_source_positions)}


def _transcription(module: Any, batch: int, small: bool) -> dict[str, Tensor]:
    """Of speech, what its decoder begins with: a transcript, its language, the task, no timestamps."""
    begin = torch.arange(4) + module.config.vocab_size // 2
    return {**_speech(module, batch, small), "decoder_input_ids": begin.repeat(batch, 1)}


def _tokens(length: int) -> Callable[[Any, int, bool], dict[str, Tensor]]:
    def inputs(module: Any, batch: int, small: bool) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(1, module.config.vocab_size, (batch, 16 if small else length))}

    return inputs


def _layers(module: Any) -> Any:
    return module.layers


def _named(module: nn.Module, *names: str) -> list[nn.Module]:
    """The parts of a module whose classes have these names."""
    return [part for part in module.modules() if type(part).__name__ in names]


def pretrained_model(model: WholeModel, folder: str, dtype: torch.dtype) -> Any:
    """The module with the weights that are in `folder`, as its library saves them, on the default device."""
    with torch.device("meta"):
        kind: Any = type(model.build(True, None))
    dtype_name = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    module = kind.from_pretrained(folder, **{dtype_name: dtype}).to(torch.get_default_device())
    return module.get_submodule(model.part)


def random_model(model: WholeModel, small: bool, layers: int | None, dtype: torch.dtype, seed: int = 0) -> Any:
    """The module, with weights that keep numbers as large as they come: normal, each row of length 1; those of norms are 1.

    Some libraries leave weights zero, which pretrained ones are not, and whose output says nothing of a format. It is built in
    `dtype`, and never whole in another: the same numbers, rounded, whatever the dtype. Buffers are those of the library.
    """
    with _default_dtype(dtype):
        module: Any = model.build(small, layers).get_submodule(model.part)
    torch.manual_seed(seed)
    with torch.no_grad():
        for owner in module.modules():
            for name, p in owner.named_parameters(recurse=False):
                if p.dim() > 1:
                    row = p[0].numel() if isinstance(owner, CONVOLUTIONS) else p.shape[-1]
                    p.copy_(torch.empty_like(p, dtype=torch.float32).normal_(std=row**-0.5))
                else:
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODELS = {
    "sam-vit-h": WholeModel(
        _sam,
        _image,
        (1, 8, 32),
        "an image of 1024 x 1024 through SAM's encoder",
        part="vision_encoder",
        compiled=_layers,
        fuse=_fuse_positions,
    ),
    # Compiled whole, it makes a mask that lets every token see all, for which PyTorch has no fast attention over 197 of them.
    "vit-l": WholeModel(_vit, _image, (1, 64), "an image of 224 x 224 through ViT-L/16", compiled=_layers),
    "dinov2-l": WholeModel(
        _dinov2,
        _image,
        (1, 64),
        "an image of 518 x 518 through DINOv2-L/14",
        compiled=lambda module: module.encoder.layer,
    ),
    "sdxl": WholeModel(
        _sdxl,
        _sdxl_step,
        (1, 2),
        "a step of SDXL's UNet at 1024 x 1024",
        compiled=lambda module: _named(module, "Transformer2DModel", "ResnetBlock2D"),
        # Not those of the text, for 77 tokens, nor those outside of the transformers: there is little to gain of them. After
        # attention, to quantize its result takes longer than what the product is faster, and costs 2 dB.
        quantized=lambda layer, name: (
            isinstance(layer, nn.Linear)
            and "transformer_blocks" in name
            and not name.endswith(("attn2.to_k", "attn2.to_v", "to_out.0"))
        ),
    ),
    "flux": WholeModel(
        _flux,
        _flux_step,
        (1,),
        "a step of Flux's transformer at 1024 x 1024",
        compiled=lambda module: (*module.transformer_blocks, *module.single_transformer_blocks),
        # Those of norms, for one token, and those before and after the blocks take little time, and accuracy.
        quantized=lambda layer, name: (
            isinstance(layer, nn.Linear) and "transformer_blocks" in name and "norm" not in name
        ),
    ),
    "whisper-encoder": WholeModel(
        _whisper,
        _speech,
        (1, 16),
        "30 s of speech through Whisper-large-v3's encoder",
        part="model.encoder",
        compiled=_layers,
    ),
    "whisper-decode": WholeModel(
        _whisper,
        _transcription,
        (1, 16),
        "a token of Whisper-large-v3's decoder by generate",
        decodes=True,
        # The encoder runs once a call, before the first token.
        quantized=lambda layer, name: isinstance(layer, nn.Linear) and "encoder.layers" not in name,
    ),
    "llama-prefill": WholeModel(_llama, _tokens(2048), (1,), "a prompt of 2,048 tokens through Llama-3.1-8B"),
    "llama-decode": WholeModel(_llama, _tokens(16), (1,), "a token of Llama-3.1-8B by generate", decodes=True),
    "mixtral-decode": WholeModel(
        _mixtral, _tokens(16), (1,), "a token of Mixtral-8x7B, 8 blocks, by generate", decodes=True
    ),
}
