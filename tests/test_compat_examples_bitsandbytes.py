"""The examples of bitsandbytes' pages, written anew with small models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao
import ao.compat.bitsandbytes as bnb


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(64, 128)
        self.special = nn.Linear(128, 64)
        self.also_special = nn.Linear(64, 8)

    def forward(self, x):
        return self.also_special(torch.relu(self.special(torch.relu(self.fc1(x)))))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), torch.ones(32, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.setattr(bnb.optim.GlobalOptimManager, "_instance", None)
    return bnb.optim.GlobalOptimManager.get_instance()


def states(optimizer, parameter):
    return [isinstance(t, ao.QTensor) for name, t in optimizer.state[parameter].items() if name != "step"]


class TestQuickstart:
    @pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("nf4", None)])
    def test_language_models(self, name, bits, tmp_path):
        """load_in_8bit and load_in_4bit of transformers' BitsAndBytesConfig are names of formats here."""
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.integrations.transformers import AoConfig

        hf_models.llama(num_hidden_layers=1).save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AoConfig(name))
        assert getattr(model.model.layers[0].mlp.up_proj.weight.spec, "bits", None) in (bits, 4)
        assert model.generate(hf_models.IDS, max_new_tokens=2, do_sample=False).shape[1] == hf_models.IDS.shape[1] + 2

    def test_optimizer(self):
        model = Net()
        losses = fit(model, bnb.optim.Adam8bit(model.parameters(), lr=1e-2, compile=False))
        assert losses[-1] < losses[0]

    def test_8_bit_layer(self):
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        x = torch.randn(4, 64, dtype=torch.float16)
        expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
        assert 30 < ao.compute_error(expected, layer.to("cpu")(x).float()) < 50

    def test_4_bit_layer(self):
        layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16)
        x = torch.randn(4, 64, dtype=torch.bfloat16)
        expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
        assert 15 < ao.compute_error(expected, layer.to("cpu")(x).float()) < 30


class TestOptimizers:
    def test_small_parameters_in_32_bits(self):
        model = nn.Linear(128, 64)
        optimizer = bnb.optim.Adam8bit(model.parameters(), min_8bit_size=16384, compile=False)
        model(torch.randn(2, 128)).sum().backward()
        optimizer.step()
        assert states(optimizer, model.weight) == [False, False]

    def test_adam(self):
        model = Net()
        optimizer = bnb.optim.Adam8bit(model.parameters(), lr=0.001, betas=(0.9, 0.995), compile=False)
        fit(model, optimizer, 1)
        assert states(optimizer, model.fc1.weight) == [True, True] and states(optimizer, model.fc1.bias) == [
            False,
            False,
        ]

    def test_clipping_by_percentile(self):
        p = nn.Parameter(torch.zeros(4))
        optimizer = bnb.optim.Adam(
            [p], lr=0.001, betas=(0.9, 0.995), optim_bits=32, percentile_clipping=5, compile=False
        )
        for scale in (1.0, 2.0, 100.0):
            p.grad = torch.full((4,), scale)
            optimizer.step()
        assert p.grad.norm() == pytest.approx(2.0)  # of 2, 4 and 200 the smallest

    @pytest.mark.parametrize(
        "name",
        [
            "AdamW",
            "AdamW8bit",
            "PagedAdamW32bit",
            "PagedAdamW8bit",
            "Lion8bit",
            "PagedLion",
            "SGD8bit",
            "SGD",
            "RMSprop",
            "RMSprop8bit",
            "Adagrad",
            "Adagrad8bit",
            "LAMB",
            "LAMB8bit",
            "LAMB32bit",
            "LARS",
            "LARS8bit",
            "PytorchLARS",
            "AdEMAMix",
            "AdEMAMix8bit",
            "PagedAdEMAMix8bit",
            "PagedAdEMAMix32bit",
        ],
    )
    def test_others(self, name):
        model = Net()
        rate = {"lr": 1e-2, "momentum": 0.9} if "SGD" in name or "LARS" in name else {"lr": 1e-3}
        losses = fit(model, getattr(bnb.optim, name)(model.parameters(), **rate, compile=False))
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("kind", ["StableEmbedding", "Embedding"])
    def test_embeddings_keep_32_bits(self, kind, manager):
        layer = getattr(bnb.nn, kind)(64, 128)
        optimizer = bnb.optim.Adam8bit(layer.parameters(), compile=False)
        layer(torch.arange(8)).square().sum().backward()
        optimizer.step()
        assert states(optimizer, layer.weight) == [False, False]

    def test_settings_of_parameters(self, manager):
        model = Net()
        manager.register_parameters(model.parameters())
        optimizer = bnb.optim.Adam(model.parameters(), lr=0.001, optim_bits=8, compile=False)
        manager.override_config(model.fc1.weight, "optim_bits", 32)
        manager.override_config(
            [model.special.weight, model.also_special.weight],
            key_value_dict={"is_sparse": True, "lr": 0.0, "betas": (0.9, 0.98)},
        )
        before = [p.detach().clone() for p in (model.fc1.weight, model.special.weight)]
        fit(model, optimizer, 2)
        assert states(optimizer, model.fc1.weight) == [False, False]
        assert states(optimizer, model.special.weight) == [True, True]
        assert not torch.equal(before[0], model.fc1.weight) and torch.equal(before[1], model.special.weight)
        betas = [group["betas"] for group in optimizer.param_groups if group["lr"] == 0]
        assert betas == [(0.9, 0.98)] * 2

    def test_settings_of_a_module(self, manager):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(128, 64)
                manager.register_module_override(self.linear, "weight", {"optim_bits": 32, "lr": 0.0})

        model = Own()
        optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=0.1, compile=False)
        before = model.linear.weight.detach().clone()
        model.linear(torch.randn(2, 128)).sum().backward()
        optimizer.step()
        assert states(optimizer, model.linear.weight) == [False, False] and torch.equal(before, model.linear.weight)


class TestReference:
    def test_weights_of_a_plain_model_in_4_bit_layers(self):
        plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        quantized = nn.Sequential(bnb.nn.Linear4bit(64, 64), bnb.nn.Linear4bit(64, 64))
        quantized.load_state_dict(plain.state_dict())
        quantized = quantized.to("cpu")
        x = torch.randn(4, 64)
        assert 12 < ao.compute_error(plain(x), quantized(x)) < 30

    def test_weights_of_a_plain_model_in_8_bit_layers(self):
        plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
        quantized = nn.Sequential(*[bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False) for _ in range(2)])
        quantized.load_state_dict(plain.state_dict())
        x = torch.randn(4, 64).half()
        assert 28 < ao.compute_error(plain(x).float(), quantized.to("cpu")(x).float()) < 50

    def test_quantized_storage_for_fsdp(self):
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16)
        x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
        layer.to("cpu")(x).sum().backward()
        assert x.grad.shape == (2, 64) and not layer.weight.requires_grad

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_4_bits_by_hand(self, kind, nested):
        w = torch.randn(64, 256)
        codes, state = bnb.functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
        assert codes.numel() == w.numel() // 2
        assert 15 < ao.compute_error(w, bnb.functional.dequantize_4bit(codes, state)) < 25

    def test_8_bits_in_blocks_by_hand(self):
        w = torch.randn(64, 256)
        codes, state = bnb.functional.quantize_blockwise(w)
        assert (
            codes.dtype == torch.uint8
            and 35 < ao.compute_error(w, bnb.functional.dequantize_blockwise(codes, state)) < 50
        )

    def test_adapters(self, tmp_path):
        """QLoRA: a frozen base in 4 bits, and what is added to it."""
        base = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(up.weight)
        optimizer = bnb.optim.PagedAdamW32bit([*down.parameters(), *up.parameters()], lr=1e-1, compile=False)
        x, losses = torch.randn(16, 64), []
        for _ in range(4):
            loss = F.mse_loss(base(x) + up(down(x)), torch.ones(16, 32))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] and base.weight.grad is None
