"""Weights that are int8 and trained: optimizers that write many at once, state dicts, and the Trainer of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import spawn
from safetensors.torch import load_file, save_file
from torch import nn

import ao
import ao.optim
from ao.dtypes import QTensor
from ao.quant import compute_error
from ao.train import (
    convert_from_low_precision_training,
    convert_to_low_precision_training,
    int8_weight_only_quantized_training,
)


def net(dtype: torch.dtype = torch.float32, int8: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).to(dtype)
    return convert_to_low_precision_training(model, int8_weight_only_quantized_training()) if int8 else model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).to(model[0].bias.dtype)
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = {
    **{
        f"{cls.__name__} {kind} {options}": (cls, {kind: True, **options})
        for cls, options in [
            (torch.optim.AdamW, {"lr": 1e-2}),
            (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
            (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
            (torch.optim.SGD, {"lr": 10.0}),
            (torch.optim.SGD, {"lr": 10.0, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
            (torch.optim.Adagrad, {"lr": 1e-2, "weight_decay": 1e-2}),
        ]
        for kind in ("fused", "foreach")
    },
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "weight_decay": 1e-2}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    """A weight comes out where a plain one does, but for the step of its grid that each of at most two writes may round; biases,
    in the same list, where theirs do."""
    cls, options = OPTIMIZERS[name]
    model, plain = net(), net(int8=False)
    plain.load_state_dict(model.state_dict())
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for m in (model, plain):
        step(m, cls(m.parameters(), **options))
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        p, q = p.detach(), q.detach()
        assert (p - before[name]).abs().max() > 0
        if isinstance(q, QTensor):
            assert ((q.dequantize() - p).abs() <= q.scale * 2.01).all()
            assert (q.dequantize() != before[name]).any()
        else:
            torch.testing.assert_close(q, p)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_in_bfloat16(name):
    """As one parameter after the other is written."""
    cls, options = OPTIMIZERS[name]
    model, single = net(torch.bfloat16), net(torch.bfloat16)
    before = model[0].weight.detach().dequantize()
    singly = {key: value for key, value in options.items() if key not in ("fused", "foreach")}
    step(model, cls(model.parameters(), **options))
    step(single, cls(single.parameters(), **singly, foreach=False))
    found, expected = (m[0].weight.detach().dequantize() for m in (model, single))
    assert found.dtype == torch.bfloat16
    assert compute_error(expected, found) > 30
    assert not torch.equal(found, before)


OURS = ["Adam4bit", "Adam8bit", "AdamFp8", "AdamW", "AdamW4bit", "AdamW8bit", "AdamWFp8", "Lion8bit", "SGD8bit"]
OURS += ["RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit", "LAMB8bit"]


@pytest.mark.parametrize("name", OURS)
def test_optimizers_of_ours(name):
    model = net()
    optimizer = getattr(ao.optim, name)(model.parameters(), lr=3e-3, compile=False)
    x = torch.randn(32, 64)
    losses = []
    for _ in range(15):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert isinstance(model[0].weight, QTensor) and losses[-1] < losses[0] * (
        0.999 if name in ("SGD8bit", "LAMB8bit") else 0.9
    )


def test_small_updates_arrive_on_average():
    """By a fused optimizer too, in bfloat16: they are added in float32."""
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    convert_to_low_precision_training(layer, int8_weight_only_quantized_training())
    before = layer.weight.detach().dequantize().float()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    update = 0.02 * layer.weight.detach().scale.max()
    for _ in range(20):
        layer.weight.grad = torch.full((256, 256), update.item(), dtype=torch.bfloat16)
        optimizer.step()
    moved = (before - layer.weight.detach().dequantize().float()).mean()
    assert moved.item() == pytest.approx(20 * update.item(), rel=0.1)


def test_state_dicts_are_plain(tmp_path):
    """So that any tool saves them; loading gives the codes again, with `assign` too, and in a model that is not converted."""
    model = net()
    step(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert type(state["0.weight"]) is torch.Tensor and state["0.weight"].dtype == torch.float32
    for assign in (False, True):
        other = net()
        other.load_state_dict(state, assign=assign)
        assert isinstance(other[0].weight, QTensor) and other[0].weight.requires_grad
        assert torch.equal(other[0].weight.qdata, model[0].weight.qdata)
        assert compute_error(model[0].weight.dequantize(), other[0].weight.dequantize()) > 100
    plain = net(int8=False)
    plain.load_state_dict(state)
    assert torch.equal(plain[0].weight, model[0].weight.dequantize())
    copied = copy.deepcopy(model)
    copied.load_state_dict(copied.state_dict())
    assert torch.equal(copied[0].weight.qdata, model[0].weight.qdata)
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
        other.load_state_dict({**state, "0.weight": torch.zeros(3, 64)})
    # The parameters themselves are what ao.save writes.
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight
    ao.save(model, tmp_path / "packed.safetensors")
    assert torch.equal(ao.load(tmp_path / "packed.safetensors")["0.weight"], model[0].weight)
    convert_from_low_precision_training(model)
    assert not model[0]._state_dict_hooks and not model[0]._load_state_dict_pre_hooks


def test_quantized_for_inference_after_training():
    """What is quantized anew stays quantized in a state dict."""
    model = net()
    convert_from_low_precision_training(model)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert isinstance(model.state_dict()["0.weight"], QTensor)


def llama(kind: str):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    if kind == "int8":
        return convert_to_low_precision_training(model, int8_weight_only_quantized_training())
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def train(model, folder, steps: int = 4, resume=None, **options):
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 100, (64, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        learning_rate=1e-2, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# transformers tells gloo's processes apart by names that PyTorch has given up.
trainer = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@trainer
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_trainer(tmp_path, optim):
    """Its default optimizer and Adafactor; plain weights in a checkpoint; going on from one ends where going through does."""
    whole = llama("int8")
    start = {name: t.clone() for name, t in whole.state_dict().items()}
    train(whole, tmp_path / "whole", optim=optim)
    assert type(load_file(tmp_path / "whole/checkpoint-2/model.safetensors")["lm_head.weight"]) is torch.Tensor
    resumed = llama("int8")
    train(resumed, tmp_path / "whole", resume=str(tmp_path / "whole/checkpoint-2"), optim=optim)
    for name, t in whole.state_dict().items():
        assert compute_error(t, resumed.state_dict()[name]) > 30, name
        assert compute_error(t, start[name]) < 40, name


def run_trainer(rank: int, folder: str) -> None:
    for kind in ("int8", "adapters"):
        model = llama(kind)
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        made = train(model, f"{folder}/{kind}", per_device_train_batch_size=4)
        assert isinstance(made.model_wrapped, nn.parallel.DistributedDataParallel)
        assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
        torch.save(
            {n: t for n, t in model.state_dict().items() if not isinstance(t, QTensor)}, f"{folder}/{kind}{rank}.pt"
        )


@pytest.mark.slow
@trainer
def test_trainer_on_two_processes(tmp_path):
    """Over gloo: both end with the same weights, near those of one process that has both batches."""
    spawn(run_trainer, 2, str(tmp_path), backend=None, LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    for kind in ("int8", "adapters"):
        first, second = (torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True) for rank in (0, 1))
        single = llama(kind)
        start = {name: t.clone() for name, t in single.state_dict().items()}
        train(single, tmp_path / f"single-{kind}", per_device_train_batch_size=8)
        expected = single.state_dict()
        for name in first:
            assert torch.equal(first[name], second[name]), name
            if not torch.equal(start[name], expected[name]):
                assert compute_error(expected[name], first[name]) > 20, name


def test_the_integration_leaves_plain_state_dicts_plain(tmp_path):
    """Trained int8 weights are plain in a state dict, and so in what `save_pretrained` writes."""
    safetensors = pytest.importorskip("safetensors.torch")
    transformers = pytest.importorskip("transformers")
    import ao.integrations.transformers

    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    ao.train.convert_to_low_precision_training(model, ao.train.int8_weight_only_quantized_training())
    model.save_pretrained(tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (64, 32)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
