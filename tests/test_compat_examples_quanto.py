"""The examples of optimum-quanto's pages and of its examples folder, written anew with small models."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


def samples(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(count)]


def noise(model: nn.Module) -> float:
    """SQNR of a quantized mlp, in dB."""
    x = samples(1)[0]
    with torch.no_grad():
        return float(ao.compute_error(mlp()(x), model(x)))


class TestReadme:
    @pytest.mark.parametrize(
        ("weights", "low"), [("qint8", 38), ("qint4", 17), ("qint2", 3), ("qfloat8", 27), ("qfloat8_e5m2", 21)]
    )
    def test_quantize_and_freeze(self, weights, low):
        import ao.compat.quanto as quanto

        model = mlp()
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        assert low < noise(model) < low + 10

    @pytest.mark.parametrize(("activations", "low"), [("qint8", 27), ("qfloat8", 24)])
    def test_calibrate(self, activations, low):
        import ao.compat.quanto as quanto
        from ao.compat.quanto import Calibration, freeze, qint8, quantize

        model = mlp()
        quantize(model, weights=qint8, activations=getattr(quanto, activations))
        with Calibration(momentum=0.9):
            for x in samples():
                model(x)
        freeze(model)
        assert low < noise(model) < 45

    def test_tune(self):
        from ao.compat.quanto import Calibration, freeze, qint4, qint8, quantize

        model = mlp()
        quantize(model, weights=qint4, activations=qint8)
        with Calibration(momentum=0.9):
            model(samples(1)[0])
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        target, losses = torch.arange(32) % 10, []
        for x in samples(1) * 5:
            optimizer.zero_grad()
            loss = F.nll_loss(model(x).dequantize().log_softmax(-1), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        freeze(model)
        assert losses[-1] < losses[0] and model[0].weight.spec.bits == 4

    def test_serialize_and_requantize(self, tmp_path):
        from safetensors.torch import load_file, save_file

        from ao.compat.quanto import freeze, qint8, quantization_map, quantize, requantize

        model = mlp()
        quantize(model, weights=qint8)
        freeze(model)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "map.json").write_text(json.dumps(quantization_map(model)))
        with torch.device("meta"):
            new = mlp()
        requantize(
            new,
            load_file(tmp_path / "model.safetensors"),
            json.loads((tmp_path / "map.json").read_text()),
            device=torch.device("cpu"),
        )
        assert torch.equal(new(samples(1)[0]), model(samples(1)[0]))

    def test_pickled_weights(self, tmp_path):
        from ao.compat.quanto import freeze, qint4, quantization_map, quantize, requantize

        model = mlp()
        quantize(model, weights=qint4)
        freeze(model)
        torch.save(model.state_dict(), tmp_path / "model.pt")
        new = mlp()
        requantize(new, torch.load(tmp_path / "model.pt", weights_only=True), quantization_map(model))
        assert torch.equal(new(samples(1)[0]), model(samples(1)[0]))

    def test_language_models(self, tmp_path):
        pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.quanto import QuantizedModelForCausalLM, qint4

        model = QuantizedModelForCausalLM.quantize(
            hf_models.llama(num_hidden_layers=1), weights=qint4, exclude="lm_head"
        )
        assert not isinstance(model.lm_head.weight, ao.QTensor)
        model.save_pretrained(tmp_path)
        again = QuantizedModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))

    def test_diffusion_models(self, tmp_path):
        diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'ao-lowbit[diffusers]'")
        from ao.compat.quanto import QuantizedPixArtTransformer2DModel, qfloat8

        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=16,
        )
        quantized = QuantizedPixArtTransformer2DModel.quantize(model, weights=qfloat8)
        quantized.save_pretrained(tmp_path)
        again = QuantizedPixArtTransformer2DModel.from_pretrained(tmp_path)
        assert isinstance(next(m for m in again.modules() if isinstance(m, nn.Linear)).weight, ao.QTensor)


class TestExamples:
    @pytest.mark.parametrize("weights", ["int4", "int8", "float8"])
    @pytest.mark.parametrize("activations", ["none", "int8", "float8"])
    def test_digits(self, weights, activations):
        """Quantize, calibrate, tune, freeze, save and load: the whole of its first example."""
        from ao.compat.quanto import (
            Calibration,
            QTensor,
            freeze,
            qfloat8,
            qint4,
            qint8,
            quantization_map,
            quantize,
            requantize,
        )

        kinds = {"none": None, "int4": qint4, "int8": qint8, "float8": qfloat8}
        model, x = mlp(), samples(1)[0]
        quantize(model, weights=kinds[weights], activations=kinds[activations])
        if activations != "none":
            with Calibration():
                model(x)
        optimizer = torch.optim.Adadelta(model.train().parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            out = model(x)
            out = out.dequantize() if isinstance(out, QTensor) else out
            loss = F.nll_loss(out.log_softmax(-1), torch.arange(32) % 10)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        freeze(model.eval())
        new = mlp()
        requantize(new, model.state_dict(), quantization_map(model), torch.device("cpu"))
        assert losses[-1] < losses[0] and torch.equal(new(x), model(x))

    def test_generation(self):
        pytest.importorskip("transformers", reason="needs transformers")
        import hf_models

        from ao.compat.quanto import Calibration, QuantizedModelForCausalLM, qint8

        model = QuantizedModelForCausalLM.quantize(
            hf_models.llama(num_hidden_layers=1), weights=qint8, activations=qint8
        )
        with Calibration():
            model(hf_models.IDS)
        ids = model.generate(hf_models.IDS, max_new_tokens=4, do_sample=False)
        assert ids.shape == (len(hf_models.IDS), hf_models.IDS.shape[1] + 4)

    def test_detection_heads_stay(self):
        from ao.compat.quanto import freeze, qint8, quantize

        model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(10, 4)})
        quantize(model["body"], weights=qint8)
        freeze(model)
        assert [isinstance(m.weight, ao.QTensor) for m in (model["body"][0], model["head"])] == [True, False]

    def test_images(self):
        from ao.compat.quanto import freeze, qint8, quantize

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
        x = torch.randn(2, 3, 8, 8)
        expected = model(x)
        quantize(model, weights=qint8)
        freeze(model)
        assert 35 < ao.compute_error(expected, model(x)) < 55

    def test_names_to_leave_out(self):
        from ao.compat.quanto import freeze, qint8, quantize

        model = mlp()
        quantize(model, weights=qint8, exclude=["2"])
        freeze(model)
        assert [isinstance(model[i].weight, ao.QTensor) for i in (0, 2)] == [True, False]

    def test_weights_by_hand(self):
        from ao.compat.quanto import MaxOptimizer, qint4, quantize_weight

        w = mlp()[0].weight.detach()
        scale, shift = MaxOptimizer()(w, qint4, 0, 32)
        q = quantize_weight(w, qint4, 0, scale, shift, 32)
        assert 19 < ao.compute_error(w, q.dequantize()) < 27
