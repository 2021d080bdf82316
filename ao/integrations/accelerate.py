"""Hugging Face accelerate and the Trainer of transformers: their switches for float8 training, and for low-bit optimizers.

    import ao.integrations.accelerate

    accelerator = Accelerator(mixed_precision="fp8")  # or ACCELERATE_MIXED_PRECISION=fp8, which the Trainer reads too
    model, optimizer = accelerator.prepare(model, optimizer)

    Trainer(model, TrainingArguments(optim="adamw_torch_8bit"))  # or "adamw_torch_4bit"

accelerate reaches these through torchao, and has no place to say otherwise. So the import redirects the few functions that do:
from here on, of this process, they are ours. `AORecipeKwargs(config=ao.train.Float8LinearConfig(...))` says how; without one it
is the recipe "tensorwise" with pad_inner_dim, as there. The first and the last linear layer, and those whose sizes are not
multiples of 16, stay as they are. A chip without float8 computes the same numbers in floating point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, imports
from accelerate.utils import ao as theirs
from accelerate.utils.environment import parse_flag_from_env
from torch import nn

from ..train import (
    Float8LinearConfig,
    LowPrecisionLinear,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from ..train.gather import unwrapped
from .redirect import redirect

__all__ = ["convert_model"]


def convert_model(
    model: nn.Module,
    config: Float8LinearConfig | None = None,
    module_filter_func: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Let the linear layers of a model train in float8, in place: what `Accelerator.prepare` does to it.

    module_filter_func: `(module, name) -> bool`; by default all but the first and the last linear layer, of sizes that are
        multiples of 16.
    """
    if config is not None and not isinstance(config, Float8LinearConfig):
        raise TypeError(
            f"AORecipeKwargs: config must be an ao.train.Float8LinearConfig, got a {type(config).__name__} of "
            f"{type(config).__module__}"
        )
    if module_filter_func is None:
        ends = theirs.find_first_last_linear_layers(model)

        def module_filter_func(module: nn.Module, name: str) -> bool:
            return bool(theirs.filter_linear_layers(module, name, layers_to_filter=list(ends)))

    convert_to_float8_training(model, module_filter_fn=module_filter_func, config=config)


def _has_layers(model: nn.Module) -> bool:
    return any(isinstance(m, LowPrecisionLinear) and m.recipe.uses_float8 for m in model.modules())


def _complete(recipe: Any) -> None:
    """The config of an `AORecipeKwargs`, from its other fields and the environment."""
    if recipe.config is not None:
        return
    for field in ("pad_inner_dim", "enable_fsdp_float8_all_gather"):
        if getattr(recipe, field) is None:
            setattr(recipe, field, parse_flag_from_env(f"ACCELERATE_FP8_{field.upper()}", default=True))
    recipe.config = Float8LinearConfig(
        pad_inner_dim=recipe.pad_inner_dim, enable_fsdp_float8_all_gather=recipe.enable_fsdp_float8_all_gather
    )


def _prepare(accelerator: Any, *args: Any) -> tuple[Any, ...]:
    """Convert the models among what `Accelerator.prepare` was given."""
    recipe = accelerator.ao_recipe_handler
    config = recipe.config
    if isinstance(config, Float8LinearConfig) and not accelerator.is_fsdp2:
        # Nothing gathers, and the optimizer holds the parameters that are there.
        config = dataclasses.replace(config, enable_fsdp_float8_all_gather=False)
    models = [x for x in args if isinstance(x, nn.Module)]
    for model in models:
        convert_model(model, config, recipe.module_filter_func)
    if accelerator.is_fsdp2 and models and config.enable_fsdp_float8_all_gather:
        for optimizer in [x for x in args if isinstance(x, torch.optim.Optimizer)][:1]:
            optimizer.register_step_post_hook(lambda *_: precompute_float8_dynamic_scale_for_fsdp(models[0]))
    return args


def _named_parameters(accelerator: Any, *args: Any, drop_refs: bool = False) -> dict[str, Any]:
    """What FSDP2 finds the parameters of an optimizer by: the parameters, or where the numbers of each are."""
    if not drop_refs:
        return _their_named_parameters(accelerator, *args, drop_refs=drop_refs)
    found = {}
    for x in args:
        if isinstance(x, nn.Module):
            for name, p in accelerator.unwrap_model(x, keep_torch_compile=False).named_parameters():
                plain = unwrapped(p)
                found[name] = getattr(plain, "_local_tensor", plain).data_ptr()
    return found


def _optimizer(ctx: Any) -> tuple[Any, dict[str, Any]]:
    """The optimizer of "adamw_torch_4bit" and "adamw_torch_8bit", and its arguments, from those of the Trainer."""
    from ..optim import AdamW4bit, AdamW8bit

    if "block_size" in ctx.optim_args:
        ctx.optimizer_kwargs["block_size"] = int(ctx.optim_args["block_size"])
    rounding = str(ctx.optim_args.get("bf16_stochastic_round", False)).lower()
    ctx.optimizer_kwargs["bf16_stochastic_round"] = rounding in ("1", "true", "yes", "y", "on")
    ctx.optimizer_kwargs.update(ctx.adam_kwargs)
    name = getattr(ctx.args.optim, "value", ctx.args.optim)
    return AdamW4bit if name == "adamw_torch_4bit" else AdamW8bit, ctx.optimizer_kwargs


def _redirect() -> None:
    redirect(imports.is_torchao_available, lambda: True)
    redirect(theirs.has_ao_layers, _has_layers)
    redirect(theirs.convert_model_to_fp8_ao, convert_model)
    redirect(AORecipeKwargs.__post_init__, _complete)
    redirect(Accelerator._prepare_ao, _prepare)
    try:
        from transformers import trainer_optimizer
    except ImportError:
        return
    redirect(trainer_optimizer._get_torchao_optimizer, _optimizer)


_their_named_parameters = redirect(Accelerator._get_named_parameters, _named_parameters)
_redirect()
