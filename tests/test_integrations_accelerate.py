"""accelerate under transformers: device maps, offloading, and the Trainer with our optimizer."""

from __future__ import annotations

import pytest
import torch

import ao
from ao.optim import AdamW8bit
from ao.quant.qat import QATConfig
from ao.train import Float8LinearConfig, LowPrecisionLinear, convert_to_float8_training

transformers = pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'ao-lowbit[hf]'")

import hf_models  # noqa: E402
from hf_models import FORMATS, IDS  # noqa: E402

from ao.integrations.transformers import AoConfig, mark_quantized  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("llama")
    hf_models.llama().bfloat16().save_pretrained(made)
    return made


def load(folder, form="int4", **kwargs):
    config = AoConfig(FORMATS[form], include_embedding=form != "mixed")
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, folder, tmp_path):
    model = load(folder, device_map=device_map)
    out = hf_models.output("llama", model)
    assert torch.equal(out, hf_models.output("llama", load(folder)))
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(hf_models.output("llama", again), out)


@pytest.mark.parametrize("form", FORMATS)
def test_offloading_to_the_cpu(form, folder):
    """Each layer is moved where it runs when it runs: parameters on meta in between, tied ones one on each device."""
    out = hf_models.output("llama", load(folder, form))
    model = accelerate.cpu_offload(load(folder, form), execution_device=CPU)
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(hf_models.output("llama", model), out)
    model = accelerate.dispatch_model(load(folder, form), device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(hf_models.output("llama", model), out)


def test_the_disk_is_refused(folder, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    load(folder).save_pretrained(tmp_path / "saved")
    for attempt in (
        lambda: load(folder, device_map=device_map, offload_folder=tmp_path),
        lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", device_map=device_map),
        lambda: load(folder, device_map="auto", max_memory={"cpu": 20_000}, offload_folder=tmp_path),
    ):
        with pytest.raises(ValueError, match="on the disk, where accelerate stores plain tensors only"):
            attempt()


def test_device_maps_count_packed_bytes(folder):
    model = load(folder, "int4")
    sizes = transformers.integrations.accelerate.compute_module_sizes
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    name = "model.layers.0.mlp.up_proj"
    assert sizes(model, model.hf_quantizer)[0][name] == model.get_parameter(f"{name}.weight").nbytes_packed
    assert sizes(plain)[0][name] == 2 * 64 * 128


def examples_of(count, length=12):
    found = [torch.arange(i, i + length) % 90 + 3 for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def arguments(folder, **kwargs):
    return transformers.TrainingArguments(
        str(folder), **{"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **kwargs}
    )


def losses_of(trainer):
    return [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]


def test_trainer(tmp_path):
    """The Trainer with an 8-bit optimizer; stopped and resumed, it goes the same way."""

    def train(resume=None):
        torch.manual_seed(0)
        model = hf_models.llama(num_hidden_layers=1)
        args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=4, save_steps=2)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, compile=False)
        trainer = transformers.Trainer(model, args, train_dataset=examples_of(32), optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return losses_of(trainer), model.state_dict()

    losses, weights = train()
    assert losses[-1] < losses[0] - 0.1
    _, again = train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(again[name], w) for name, w in weights.items())


def test_trainer_on_a_model_prepared_for_quantization(tmp_path):
    """QAT: what is trained is, bit for bit, what is converted, saved and loaded again."""
    torch.manual_seed(0)
    model = hf_models.llama(num_hidden_layers=1)
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))

    def chosen(module, name):
        return ao.is_linear(module, name) and name != "lm_head"

    ao.quantize_(model, QATConfig(config, step="prepare"), chosen)
    args = arguments(tmp_path / "run", per_device_train_batch_size=8, max_steps=4, save_steps=4, learning_rate=1e-2)
    trainer = transformers.Trainer(model, args, train_dataset=examples_of(32))
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.1
    checkpoint = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(checkpoint.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    trained = hf_models.output("llama", model.eval())
    ao.quantize_(model, QATConfig(config, step="convert"))
    assert torch.equal(hf_models.output("llama", model), trained)
    mark_quantized(model).save_pretrained(tmp_path / "saved")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, ao.QTensor)
    assert torch.equal(hf_models.output("llama", again), trained)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_trainer_on_a_float8_model(recipe, tmp_path):
    torch.manual_seed(0)
    model = hf_models.llama(num_hidden_layers=1)
    config = Float8LinearConfig.from_recipe_name(recipe)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "lm_head")
    assert isinstance(model.model.layers[0].mlp.up_proj, LowPrecisionLinear)
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=4, save_steps=4, learning_rate=1e-2, bf16=True)
    trainer = transformers.Trainer(model, args, train_dataset=examples_of(32))
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0] - 0.1
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")  # of plain weights
    up = plain.model.layers[0].mlp.up_proj
    assert type(up) is torch.nn.Linear and torch.equal(up.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft, of transformers
def test_trainer_and_adapters(folder, tmp_path):
    """QLoRA: adapters over a model of 4 bits. Without adapters, the Trainer refuses."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'ao-lowbit[peft]'")
    model = load(folder, "nf4")
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-2)
    examples = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(model, args, train_dataset=examples)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.named_parameters() if isinstance(p, ao.QTensor)}
    trainer = transformers.Trainer(model, args, train_dataset=examples)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert before and all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
