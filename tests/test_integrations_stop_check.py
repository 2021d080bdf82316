"""`generate` of quantized models on a GPU, which looks one step late whether it shall stop."""

from __future__ import annotations

import pytest
import torch
from hf_models import IDS, llama
from transformers.generation import utils as generation

import ao
from ao.integrations import transformers_stop_check
from ao.integrations.transformers import QuantizedCache
from ao.quant import Int4WeightOnlyConfig, Int8WeightOnlyConfig

pytestmark = pytest.mark.skipif(
    not hasattr(generation, "DeferredStopCheck"), reason="this version of transformers has no such check"
)


def model(device="cpu", quantized=True):
    """Of weights so large that its texts are no repetition of one token."""
    torch.manual_seed(0)
    with torch.device(device):
        made = llama(tie_word_embeddings=False, head_dim=32).eval().requires_grad_(False)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.normal_(std=layer.in_features**-0.5)
    if quantized:
        ao.quantize_(made, Int4WeightOnlyConfig(group_size=32) if device == "cuda" else Int8WeightOnlyConfig())
    return made


class Streamer:
    """Keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


class Event:
    """torch.Event, of a device that has none."""

    def __init__(self, **kwargs):
        pass

    def record(self):
        pass

    synchronize = record


def texts(made, **kwargs):
    """Of 12 tokens and of one that ends where the seventh of these comes: the tokens, and what a streamer got."""
    ids = IDS.to(made.device)
    found = []
    for eos in (None, 6):
        streamer = Streamer()
        out = made.generate(
            inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0,
            streamer=streamer, eos_token_id=None if eos is None else found[0][0, ids.shape[1] + eos].item(),
            **{name: value(made) if name == "past_key_values" else value for name, value in kwargs.items()},
        )  # fmt: skip
        out = out if isinstance(out, torch.Tensor) else out.sequences
        assert streamer.ended and streamer.tokens == out.flatten().tolist()
        found.append(out)
    assert found[1].shape[1] < found[0].shape[1]
    return found


KINDS = {
    "by itself": {},
    "static": {"cache_implementation": "static"},
    "returned": {"return_dict_in_generate": True},
    "quantized cache": {"past_key_values": lambda made: QuantizedCache(made.config, "int8", 40)},
    "growing quantized cache": {"past_key_values": lambda made: QuantizedCache(made.config, "int8")},
}


def looked(monkeypatch, device=None):
    """What is answered from now on, if the device were that one."""
    answers = []
    ours = generation.DeferredStopCheck.is_supported

    def spy(given, *args, **kwargs):
        answers.append(ours(device or given, *args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(generation.DeferredStopCheck, "is_supported", staticmethod(spy))
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens(kind, monkeypatch):
    """Late or not, to the last one before the end."""
    made = model()
    expected = texts(made, **KINDS[kind])
    answers = looked(monkeypatch, torch.device("cuda"))
    monkeypatch.setattr(torch, "Event", Event)
    for found, one in zip(texts(made, **KINDS[kind]), expected):
        assert torch.equal(found, one)
    assert answers == [True, True]


def test_a_cache_forgets_the_step_that_was_too_many(monkeypatch):
    made = model()
    looked(monkeypatch, torch.device("cuda"))
    monkeypatch.setattr(torch, "Event", Event)
    for length in (None, 40):
        caches = []

        def cache(made, caches=caches, length=length):
            caches.append(QuantizedCache(made.config, "int8", length))
            return caches[-1]

        _, out = texts(made, past_key_values=cache)
        assert int(caches[-1].get_seq_length()) == out.shape[1] - 1


def test_only_quantized_models_on_a_cuda_device(monkeypatch):
    answers = looked(monkeypatch)
    texts(model())
    assert answers == [False, False]
    answers = looked(monkeypatch, torch.device("cuda"))
    texts(model(quantized=False))
    assert answers == [False, False]
    assert not generation.DeferredStopCheck.is_supported(torch.device("cuda"), None, False, is_assistant=False)


def test_a_failed_call_leaves_nothing(monkeypatch):
    made = model()
    monkeypatch.setattr(made, "prepare_inputs_for_generation", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.generate(inputs=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, pad_token_id=0)
    assert not transformers_stop_check._late.get()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, monkeypatch):
    made = model("cuda")
    answers = looked(monkeypatch)
    late = texts(made, **KINDS[kind])
    assert answers == [True, True]
    monkeypatch.setattr(generation.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: False))
    for found, one in zip(texts(made, **KINDS[kind]), late):
        assert torch.equal(found, one)
