"""The float8 switches of accelerate and of the Trainer, and the names of low-bit optimizers: they reach ao."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from ao.optim import AdamW4bit, AdamW8bit
from ao.train import Float8LinearConfig, LowPrecisionLinear

transformers = pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'ao-lowbit[hf]'")

import hf_models  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import AORecipeKwargs, DistributedType, FullyShardedDataParallelPlugin, has_ao_layers  # noqa: E402
from hf_models import IDS  # noqa: E402
from ranks import spawn  # noqa: E402

from ao.integrations.accelerate import convert_model  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh():
    """accelerate keeps its state for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def made(layers: int = 4) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def converted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, LowPrecisionLinear)]


def train(accelerator, model, optimizer, steps: int = 3) -> list[float]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(accelerator.process_index))
    losses = []
    for _ in range(steps):
        loss = model(x).float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_mixed_precision():
    accelerator = accelerate.Accelerator(mixed_precision="fp8", cpu=True)
    model, optimizer = accelerator.prepare(*made())
    assert accelerator.fp8_backend == "AO" and converted(model) == ["1", "2"] and has_ao_layers(model)
    recipe = model[1].recipe
    assert recipe.pad and recipe.gather is None and recipe.uses_float8
    losses = train(accelerator, model, optimizer)
    assert losses[-1] < losses[0]
    assert type(model[1].weight) is nn.Parameter and "torchao" not in sys.modules


def test_models_outside_of_an_accelerator():
    model, _ = made()
    convert_model(model)
    assert converted(model) == ["1", "2"] and not converted(made()[0])


def test_a_recipe_of_ones_own():
    config = Float8LinearConfig.from_recipe_name("rowwise")
    handler = AORecipeKwargs(config=config, module_filter_func=lambda module, name: name == "0")
    accelerator = accelerate.Accelerator(mixed_precision="fp8", cpu=True, kwargs_handlers=[handler])
    model, _ = accelerator.prepare(*made())
    assert converted(model) == ["0"] and model[0].recipe == config.recipe()


def test_settings_of_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_FP8_PAD_INNER_DIM", "false")
    monkeypatch.setenv("ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER", "false")
    assert AORecipeKwargs().config == Float8LinearConfig()


def test_another_librarys_config_is_refused():
    handler = AORecipeKwargs(config={"pad_inner_dim": True})
    accelerator = accelerate.Accelerator(mixed_precision="fp8", cpu=True, kwargs_handlers=[handler])
    with pytest.raises(TypeError, match=r"an ao\.train\.Float8LinearConfig, got a dict"):
        accelerator.prepare(*made())


def _sharded(rank: int) -> None:
    PartialState(cpu=True)
    # accelerate shards on accelerators alone; of all that it does there, this is all that it looks at.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = accelerate.Accelerator(mixed_precision="fp8", cpu=True, fsdp_plugin=plugin)
    model, optimizer = made()
    before = [p.detach().clone() for p in model.parameters()]
    model, optimizer = accelerator.prepare(model, optimizer)
    assert accelerator.is_fsdp2 and converted(model) == ["1", "2"]
    assert type(model[1].weight._local_tensor).__name__ == "CastOnGather"
    losses = train(accelerator, model, optimizer)
    assert losses[-1] < losses[0]
    after = [p.full_tensor() for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def test_sharded_and_gathered_in_float8():
    spawn(_sharded, 2, backend=None, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def trained(tmp_path, **settings):
    torch.manual_seed(0)
    model = hf_models.llama(num_hidden_layers=2)
    args = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", logging_steps=1, max_steps=4, per_device_train_batch_size=8,
        learning_rate=1e-2, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 32)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    return trainer


def test_trainer_in_float8(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    trainer = trained(tmp_path)
    names = converted(trainer.model)
    assert (
        "model.layers.0.mlp.up_proj" in names
        and "lm_head" not in names
        and "model.layers.0.self_attn.q_proj" not in names
    )


@pytest.mark.parametrize(("optim", "kind"), [("adamw_torch_8bit", AdamW8bit), ("adamw_torch_4bit", AdamW4bit)])
def test_trainer_with_low_bit_optimizers(optim, kind, tmp_path):
    args = transformers.TrainingArguments(
        tmp_path, use_cpu=True, optim=optim, optim_args="block_size=128,bf16_stochastic_round=True", learning_rate=1e-2
    )
    trainer = transformers.Trainer(hf_models.llama(num_hidden_layers=1), args)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is kind
    asked = {"block_size": 128, "bf16_stochastic_round": True, "lr": 1e-2}
    assert all(group[name] == value for group in optimizer.param_groups for name, value in asked.items())
