"""`ao.compat.quanto`: names, behaviour, and the numbers that optimum-quanto 0.2.7 gives for the same data, here as literals."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

import ao
import ao.compat.quanto as quanto
from ao.compat.quanto import (
    AbsmaxOptimizer,
    Calibration,
    HqqOptimizer,
    MaxOptimizer,
    QConv2d,
    QLayerNorm,
    QLinear,
    QModuleMixin,
    QTensor,
    absmax_scale,
    freeze,
    qfloat8,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    quantization_map,
    quantize,
    quantize_weight,
    requantize,
)
from ao.compat.quanto.names import NAMES

WEIGHT = torch.sin(torch.arange(640.0) * 1.7).view(4, 160) * torch.tensor([[0.3], [1.0], [0.7], [0.1]])
INPUT = torch.cos(torch.arange(320.0) * 0.3).view(2, 160)


def one() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(160, 4, bias=False))
    model.load_state_dict({"0.weight": WEIGHT.clone()})
    return model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.lm_head = nn.Linear(64, 10, bias=False)

    def forward(self, x):
        return self.lm_head(self.block(x)).softmax(-1)


def made() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_there(name):
    assert getattr(quanto, name) is not None
    if (name != "qtypes" and not name.startswith("q")) or name in ("quantize", "quantize_weight"):
        assert getattr(quanto, name).__doc__


@pytest.mark.parametrize(
    ("kind", "group", "wanted"),
    [
        (qint8, None, [[0.23272481560707092, -0.13371562957763672, -0.5209251642227173, 0.0467987135052681],
                       [-0.10842519998550415, -0.3848230242729187, 0.3776537775993347, 0.011301804333925247]]),
        (qint4, 32, [[0.31159716844558716, -0.13035666942596436, -0.6215340495109558, 0.03389124572277069],
                     [-0.12971794605255127, -0.17028239369392395, 0.49768054485321045, 0.020136699080467224]]),
        (qint2, 32, [[0.1392076313495636, -0.6944122314453125, -0.5731404423713684, 0.024846628308296204],
                     [-0.02105972170829773, 0.4917391538619995, 0.36817246675491333, 0.0006389841437339783]]),
        (qfloat8, None, [[0.2939527630805969, -0.21859925985336304, -0.5599724650382996, 0.06485161185264587],
                         [-0.15808774530887604, -0.35486751794815063, 0.5198551416397095, 0.007977396249771118]]),
        (qfloat8_e5m2, None, [[0.12133641541004181, 0.02457946538925171, -0.20817726850509644, 0.005649533122777939],
                              [0.008754447102546692, -0.07407955825328827, 0.056965529918670654, -0.002086363732814789]]),
    ],
    ids=lambda v: getattr(v, "name", None),
)  # fmt: skip
def test_weights_have_their_numbers(kind, group, wanted):
    model = one()
    quantize(model, weights=kind)
    layer = model[0]
    assert isinstance(layer, QLinear) and not layer.frozen and layer.weight_group_size == group
    assert torch.equal(layer.weight, WEIGHT)
    before = model(INPUT)
    freeze(model)
    assert layer.frozen and isinstance(layer.weight, QTensor) and layer.weight.qtype == kind
    assert torch.allclose(model(INPUT), before, atol=1e-5)
    assert model(INPUT).flatten().tolist() == pytest.approx([v for row in wanted for v in row], abs=1e-5)
    assert kind.name in repr(model) and "frozen" in repr(model)


def test_calibration_has_their_numbers():
    model = one()
    quantize(model, weights="qint8", activations="qint8")
    plain = model(INPUT)
    with Calibration(momentum=0.9):
        model(INPUT)
        model(2 * INPUT)
    assert model[0].input_scale.item() == pytest.approx(0.008661417290568352)
    assert model[0].output_scale.item() == pytest.approx(0.004224517848342657, rel=0.02)  # of rounded inputs there
    dynamic = model(INPUT)
    freeze(model)
    assert torch.allclose(model(INPUT), dynamic, atol=1e-5) and not torch.equal(model(INPUT), plain)
    assert (model(INPUT) - plain).abs().max() < 0.05
    model(INPUT * 3)  # after the context nothing is watched
    assert model[0].input_scale.item() == pytest.approx(0.008661417290568352)


def test_calibrated_after_freezing():
    model, other = one(), one()
    for m in (model, other):
        quantize(m, weights=qint8, activations=qfloat8)
    freeze(model)
    for m in (model, other):
        with Calibration():
            m(INPUT)
    freeze(other)
    assert torch.equal(model(INPUT), other(INPUT)) and torch.equal(model[0].weight, other[0].weight)
    assert model[0].weight.spec.act == ao.Float8("e4m3", (-1, -1))


def test_include_and_exclude():
    for include, exclude, wanted in (
        (None, "lm_head", {"block.up", "block.down"}),
        ("block.*", None, {"block.up", "block.down"}),
        (["lm_head", "block.up"], None, {"lm_head", "block.up"}),
        (None, ["*.up", "lm_*"], {"block.down"}),
    ):
        model = made()
        quantize(model, weights=qint8, include=include, exclude=exclude)
        assert {name for name, m in model.named_modules() if isinstance(m, QModuleMixin)} == wanted
    quantize(model, weights=qint4, activations=qint8)
    assert model.block.down.weight_qtype == qint8 and isinstance(model.block.norm, QLayerNorm)  # those that are stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["qint2", "qint4", "qint8", "qfloat8"])
def test_saved_and_loaded(weights, dtype, tmp_path):
    model, x = made().to(dtype), torch.randn(2, 64, dtype=dtype)
    quantize(model, weights=weights, activations="qint8")
    with Calibration():
        model(x)
    freeze(model)
    state, found = model.state_dict(), json.loads(json.dumps(quantization_map(model)))
    assert found["lm_head"] == {"weights": quanto.qtypes[weights].name, "activations": "qint8"}
    ends = (
        ("weight._data", "weight._scale")
        if quanto.qtypes[weights].bits == 8
        else ("weight._data._data", "weight._scale", "weight._shift")
    )
    assert {k for k in state if k.startswith("lm_head.weight")} == {f"lm_head.{end}" for end in ends}
    quanto.safe_save(state, tmp_path / "model.safetensors")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for loaded in (quanto.safe_load(tmp_path / "model.safetensors"), torch.load(file, weights_only=True)):
        with torch.device("meta"):
            again = Model().eval()
        requantize(again, loaded, found, device="cpu")
        assert torch.equal(again(x), model(x)) and quantization_map(again) == found
        assert torch.equal(again.block.up.weight, model.block.up.weight)


class Tied(nn.Module):
    """One weight for two layers, and a buffer that is never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turns", torch.arange(64.0), persistent=False)
        self.mlp = nn.Linear(64, 64)

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids) * self.turns.cos()))


class Computed(Tied):
    """As the models of transformers: it knows how such buffers begin."""

    def _init_weights(self, module):
        if module is self:
            self.turns.copy_(torch.arange(64.0))


def test_a_model_on_meta_has_nothing_made_up():
    model, ids = Computed(), torch.arange(32)[None]
    quantize(model, weights=qint8, exclude="head")
    freeze(model)
    state = {key: t for key, t in model.state_dict().items() if key != "head.weight"}  # as safetensors keeps tied ones
    with torch.device("meta"):
        again, plain = Computed(), Tied()
    requantize(again, state, quantization_map(model))
    assert torch.equal(again(ids), model(ids)) and again.head.weight is again.embed.weight
    with pytest.raises(ValueError, match="on meta, and state_dict lacks turns; make the model on the CPU"):
        requantize(plain, state, quantization_map(model))
    with torch.device("meta"):
        again = Computed()
    with pytest.raises(ValueError, match="state_dict lacks mlp.bias"):
        requantize(again, {k: t for k, t in state.items() if k != "mlp.bias"}, quantization_map(model))


def test_trained_before_freezing():
    """Weights are rounded on the way, and the gradient passes."""
    torch.manual_seed(0)
    model, x = made().train(), torch.randn(16, 64)
    quantize(model, weights=qint4, exclude="lm_head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(8):
        loss = -model(x)[:, 3].log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and model.block.up.weight.grad.abs().sum() > 0
    rounded = model.block.up.qweight.dequantize()
    freeze(model)
    assert torch.equal(model.block.up.weight.dequantize(), rounded) and torch.isfinite(model(x)).all()


def test_convolutions():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    conv.weight.data = torch.sin(torch.arange(108.0)).view(4, 3, 3, 3)
    model = nn.Sequential(conv)
    quantize(model, weights=qint4, activations=qint8)
    assert isinstance(model[0], QConv2d)
    freeze(model)
    out = model(torch.cos(torch.arange(75.0)).view(1, 3, 5, 5)).flatten()[:4].tolist()
    assert out == pytest.approx([-0.053902268, 0.061034381, 0.119856163, -0.118032068], abs=2e-5)
    big = nn.Sequential(nn.Conv2d(32, 8, 3))
    quantize(big, weights=qint8)
    before = big(torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)))
    freeze(big)
    assert torch.allclose(before, big(torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))), atol=1e-5)


def test_layer_norms_are_there_with_activations_only():
    norm = nn.LayerNorm(64)
    assert QLayerNorm.from_module(norm) is None
    made_of = QLayerNorm.from_module(norm, activations=qint8)
    x = torch.randn(2, 64)
    assert torch.equal(made_of(x), norm(x)) and made_of.weight is norm.weight


def test_optimizers():
    assert absmax_scale(WEIGHT).item() == pytest.approx(0.007873764261603355)
    rows = [0.0006696301861666143, 0.002232071477919817, 0.0015624788356944919, 0.00022321219148579985]
    assert absmax_scale(WEIGHT, qfloat8, 0).flatten().tolist() == pytest.approx(rows)
    assert AbsmaxOptimizer()(WEIGHT, qint8, 0).shape == (4, 1) and AbsmaxOptimizer()(WEIGHT, qint8).shape == ()
    scale, shift = MaxOptimizer()(WEIGHT, qint4, 0, 32)
    assert scale.flatten()[:2].tolist() == pytest.approx([0.039917588233947754, 0.039939891546964645])
    assert shift.flatten()[:2].tolist() == pytest.approx([0.2988259494304657, 0.29944100975990295])
    zeros = MaxOptimizer()(WEIGHT, qint4, 0, 32, zeropoint=True)[1]
    assert zeros.dtype == torch.uint8 and zeros.flatten()[:4].tolist() == [7, 7, 8, 7]
    usual = (quantize_weight(WEIGHT, qint4, 0, scale, shift, 32).dequantize() - WEIGHT).abs().mean()
    better = (
        (quantize_weight(WEIGHT, qint4, 0, *HqqOptimizer()(WEIGHT, qint4, 0, 32), 32).dequantize() - WEIGHT)
        .abs()
        .mean()
    )
    assert better < 0.96 * usual  # quanto's own: 0.0151 of 0.0160
    model = one()
    quantize(model, weights=qint4, optimizer=HqqOptimizer())
    freeze(model)
    assert ((model[0].weight.dequantize() - WEIGHT).abs().mean() - better).abs() < 1e-6


def test_a_module_of_ones_own():
    @quanto.register_qmodule(nn.Bilinear)
    class QBilinear(QModuleMixin, nn.Bilinear):
        @classmethod
        def qcreate(cls, module, weights, activations=None, optimizer=None, device=None):
            return cls(module.in1_features, module.in2_features, module.out_features, weights=weights, device=device)

        def forward(self, a, b):
            return nn.functional.bilinear(
                a, b, self.rounded_weight() + 0.0 if not self.frozen else self.weight.dequantize(), self.bias
            )

    try:
        model = nn.ModuleDict({"mix": nn.Bilinear(8, 8, 4)})
        quantize(model, weights=qint8)
        assert isinstance(model["mix"], QBilinear)
        a = torch.randn(2, 8)
        before = model["mix"](a, a)
        freeze(model)
        assert torch.allclose(model["mix"](a, a), before, atol=1e-5)
    finally:
        quanto.nn._MODULES.pop(nn.Bilinear)
    with pytest.raises(TypeError, match="before torch.nn.Module"):

        class Wrong(nn.Linear, QModuleMixin):
            def __init__(self):
                QModuleMixin.__init__(self, 8, 8)

        Wrong()


def test_what_is_refused():
    with pytest.raises(ValueError, match="weights must be one of"):
        quantize(one(), weights="qint3")
    with pytest.raises(NotImplementedError, match="e4m3fnuz"):
        quantize(one(), weights=qfloat8_e4m3fnuz)
    with pytest.raises(ValueError, match="activations must be"):
        quantize(one(), weights=qint8, activations=qint4)
    for kind, optimizer in ((qint8, MaxOptimizer()), (qint4, AbsmaxOptimizer())):
        model = one()
        with pytest.raises(ValueError, match="optimizer must be"):
            quantize(model, weights=kind, optimizer=optimizer)
        assert type(model[0]) is nn.Linear


def test_compiled():
    model = made()
    quantize(model, weights=qint8)
    freeze(model)
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), atol=1e-5)


def test_models_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    quantized = quanto.QuantizedModelForCausalLM.quantize(model, weights=qint4, exclude="lm_head")
    ids = torch.arange(8)[None]
    quantized.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "quanto_qmap.json").read_text()) == quantization_map(model)
    again = quanto.QuantizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, quantized(ids).logits) and again.config.hidden_size == 64
    assert again.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)
    with pytest.raises(ValueError, match="auto_class"):
        quanto.QuantizedTransformersModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes a model of transformers"):
        quanto.QuantizedModelForCausalLM.quantize(one(), weights=qint8)
    with pytest.raises(ValueError, match="takes a quantized model"):
        quanto.QuantizedModelForCausalLM(transformers.LlamaForCausalLM(config))


def test_classes_are_what_a_tensor_holds():
    t = torch.randn(4, 32, requires_grad=True)
    scale = absmax_scale(t.detach(), qint8, 0)
    q = quanto.WeightQBytesTensor.quantize(t, qint8, 0, scale)
    assert isinstance(q, quanto.WeightQBytesTensor) and not isinstance(q, quanto.WeightQBitsTensor)
    assert (q.qtype, q.axis) == (qint8, 0) and torch.equal(q._scale, scale)
    gradient = torch.randn(4, 32)
    q.dequantize().backward(gradient)
    assert torch.equal(t.grad, gradient)
    again = quanto.WeightQBytesTensor(qint8, 0, t.size(), t.stride(), q._data, scale)
    assert torch.equal(again.dequantize(), q.dequantize())
    torch.testing.assert_close(torch.relu(q.detach()), torch.relu(q.dequantize()))
    changed = q.detach().clone()
    changed.relu_()  # in place it quantizes anew
    assert isinstance(changed, quanto.WeightQBytesTensor) and changed.dequantize().min() >= 0


def test_groups_down_the_columns():
    t = torch.randn(64, 16)
    scale, shift = torch.rand(1, 64) + 0.1, torch.rand(1, 64)
    q = quanto.WeightQBitsTensor.quantize(t, qint4, -1, 16, scale, shift)
    by_column, offsets = scale.reshape(16, 4).t(), shift.reshape(16, 4).t()  # columns, and the groups of each
    codes = ((t.reshape(4, 16, 16) + offsets[:, None]) / by_column[:, None]).round().clamp(0, 15)
    torch.testing.assert_close(q.dequantize(), (codes * by_column[:, None] - offsets[:, None]).reshape(64, 16))
    with pytest.raises(ValueError, match="two dims"):
        quanto.WeightQBitsTensor.quantize(t[None], qint4, -1, 16, scale, shift)


def test_outputs_of_modules_with_activations_can_be_dequantized():
    model, x = one(), INPUT.clone()
    quantize(model, weights=qint8, activations=qint8)
    with Calibration():
        model(x)
    out = model(x)
    plain = out.dequantize()
    assert type(plain) is torch.Tensor and type(out + 1) is torch.Tensor and torch.equal(plain, out)
    plain.sum().backward()
    assert model[0].weight.grad is not None
