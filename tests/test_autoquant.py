"""`autoquant`: what it records, how it chooses, what it promises, and the plan that it leaves."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import ao
from ao.dtypes import Float8, Intx, QTensor, cache_directory
from ao.quant import (
    AutoquantReport,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    autoquant,
    compute_error,
    finalize_autoquant,
    load_plan,
    quantize_,
)
from ao.quant.autoquant import cache, end_to_end, recording, session, timing
from ao.quant.autoquant.candidates import SETS, candidates_on, label
from ao.quant.autoquant.choosing import preference
from ao.quant.autoquant.end_to_end import Comparison
from ao.quant.autoquant.timing import Product
from ao.quant.compiled import is_compiled

K = 32
INT8, DYNAMIC, INT4 = (
    Int8WeightOnlyConfig(),
    Int8DynamicActivationInt8WeightConfig(),
    Int4WeightOnlyConfig(group_size=32),
)


class Net(nn.Module):
    """Three linear layers, of which `side` runs only when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, 2 * K)
        self.down = nn.Linear(2 * K, K)
        self.side = nn.Linear(K, K)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        self.seen += 1
        x = self.down(F.relu(self.up(x)))
        return x + self.side(x) if side else x


@pytest.fixture
def times(monkeypatch, tmp_path):
    """Timings that are made up: seconds by (tokens, label), 1.0 for what is not listed. Whole models are never slower."""
    table: dict[object, float | str] = {}
    asked: list[Product] = []

    def time_products(product, rows, variants, compiler, model_bytes):
        asked.append(product)
        return {name: table.get((product.tokens, name), table.get(name, 1.0)) for name in variants}

    def compare(model, calls, devices, before, after):
        after()
        return Comparison(2.0, 1.0, 0.01)

    monkeypatch.setattr(timing, "time_products", time_products)
    monkeypatch.setattr(end_to_end, "compare", compare)
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path / "cache"))
    table["asked"] = asked  # type: ignore[assignment]
    return table


def specs(model: nn.Module) -> dict[str, object]:
    return {
        n: m.weight.spec if isinstance(m.weight, QTensor) else None
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def left_as_it_was(model: nn.Module) -> bool:
    return not {"forward", "finalize_autoquant"} & model.__dict__.keys()


# Choosing.


def test_the_first_call_decides(times):
    times[label(INT8)] = 0.5
    model, x = Net(), torch.randn(4, K)
    want = model(x, side=True)
    assert autoquant(model, cache=False) is model
    assert specs(model) == dict.fromkeys(["up", "down", "side"])
    out = model(x, side=True)
    assert torch.equal(out, want)  # the call that decides computes what it always did
    assert specs(model) == dict.fromkeys(["up", "down", "side"], Intx(8))
    assert left_as_it_was(model) and isinstance(model.autoquant_report, AutoquantReport)
    assert compute_error(want, model(x, side=True)) > 30
    assert {(p.tokens, p.out_features, p.in_features, p.bias) for p in times["asked"]} == {
        (4, 64, 32, True),
        (4, 32, 64, True),
        (4, 32, 32, True),
    }


def test_example_input(times):
    times[label(INT8)] = 0.5
    x = torch.randn(2, 3, K)
    for example in (x, (x,), [x], {"x": x}):
        model = autoquant(Net(), example, filter_fn=lambda m, n: n in ("up", "down"), cache=False)
        assert specs(model) == {"up": Intx(8), "down": Intx(8), "side": None}
        assert model.autoquant_report.skipped == {"side": "filter_fn leaves it out"}
    assert {p.tokens for p in times["asked"]} == {6}  # 2 x 3


def test_nothing_wins(times):
    times[label(INT8)] = 0.98  # less than the margin
    times[label(DYNAMIC)] = 1.5
    model = autoquant(Net(), torch.randn(4, K), error_on_unseen=False, cache=False)
    report = model.autoquant_report
    assert specs(model) == dict.fromkeys(["up", "down", "side"]) and len(report) == 0
    assert report.skipped == {"side": "no call reached it"} and report.before_ms is None


def test_shapes_count_as_often_as_they_ran(times):
    """int8 wins at one token, int4 at 16: which one, is a matter of how often each ran."""
    times[1, label(INT8)], times[16, label(INT8)] = 0.2, 0.8
    times[1, label(INT4)], times[16, label(INT4)] = 0.5, 0.3
    for decodes, winner in ((1, INT4), (3, INT8)):
        model = autoquant(nn.Sequential(nn.Linear(K, K)), candidates=[INT8, INT4], manual=True, cache=False)
        for _ in range(decodes):
            model(torch.randn(1, K))
        model(torch.randn(16, K))
        assert specs(model) == {"0": None}
        report = model.finalize_autoquant()
        assert specs(model) == {"0": winner.weight((K, K))}
        assert report is model.autoquant_report is finalize_autoquant(model)
        assert [(t.tokens, t.count) for t in report.choices[0].timings] == [(1, decodes), (16, 1)]
        assert report.choices[0].seconds("float32") == decodes + 1


def test_preference():
    times = {"bf16": 1.0, "a": 0.5, "b": 0.49, "c": 0.3, "d": 0.98}
    assert list(preference(times, "bf16")) == ["c", "a", "b"]  # a and b are as good as equal; d saves too little
    assert list(preference({"bf16": 1.0}, "bf16")) == []


def test_tokens_are_rounded(times):
    linear = nn.Linear(K, K)
    weight = recording.Weight(linear.weight, [(linear, "")])
    for tokens, count in ((1, 5), (8, 2), (97, 1), (100, 3), (112, 1), (113, 1)):
        weight.calls[weight.product(torch.randn(tokens, K), True)] += count
    assert {p.tokens: c for p, c in weight.products().items()} == {1: 5, 8: 2, 100: 5, 113: 1}


def test_min_sqnr(times):
    times[label(INT4)], times[label(INT8)] = 0.2, 0.5
    x = torch.randn(100, K)
    for floor, spec in ((None, INT4.weight((K, K))), (10.0, INT4.weight((K, K))), (30.0, Intx(8)), (80.0, None)):
        model = autoquant(nn.Sequential(nn.Linear(K, K)), x, [INT8, INT4], min_sqnr=floor, cache=False)
        assert specs(model) == {"0": spec}, floor
        choice = model.autoquant_report.choices[0]
        if spec is not None:
            assert choice.sqnr > (floor or 0) and choice.speedup == pytest.approx(5 if spec.bits == 4 else 2)
        assert len(model.autoquant_report.notes) == (1 if floor and floor > 20 else 0) + (floor == 80)


def test_a_candidate_that_cannot_be_used(times):
    times.update(
        {label(Int4WeightOnlyConfig(group_size=48)): 0.1, label(INT4): "RuntimeError: no kernel", label(INT8): 0.5}
    )
    model = nn.Sequential(nn.Linear(K, K))
    autoquant(model, torch.randn(4, K), [Int4WeightOnlyConfig(group_size=48), INT4, INT8], cache=False)
    assert specs(model) == {"0": Intx(8)}
    notes = "\n".join(model.autoquant_report.notes)
    assert "Int4WeightOnly(group_size=32) cannot be used on 32 x 32, M = 4: RuntimeError: no kernel" in notes
    assert "Int4WeightOnly(group_size=48) cannot be used for 0: ValueError: weight: " in notes and "block 48" in notes


@pytest.mark.parametrize("manual", [False, True])
def test_the_original_weights_go_at_once(times, monkeypatch, manual):
    """Though an error that is kept holds every frame that it came through, and a cycle holds the error."""
    times[label(INT8)] = 0.5
    model, x = Net(), torch.randn(4, K)
    measure = session.measure

    def fails(*args):
        try:
            raise ValueError
        except ValueError as error:
            cycle = [error]
            cycle.append(cycle)  # type: ignore[arg-type]
        return measure(*args)

    monkeypatch.setattr(session, "measure", fails)
    originals = [weakref.ref(layer.weight) for layer in (model.up, model.down, model.side)]
    autoquant(model, manual=manual, cache=False)
    gc.collect()
    gc.disable()
    try:
        model(x, side=True)
        if manual:
            finalize_autoquant(model)
        assert not any(original() is not None for original in originals)
    finally:
        gc.enable()


def test_tied_weights(times):
    times[label(INT8)] = 0.5

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.proj = nn.Embedding(64, K), nn.Linear(K, 64, bias=False), nn.Linear(K, K)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.proj(self.embed(ids)))

    ids = torch.arange(6)
    model = autoquant(Tied(), ids, "default", cache=False)
    assert model.head.weight is model.embed.weight and model.head.weight.spec == Intx(8)
    assert set(model.autoquant_report.plan.fqn_to_config) == {"embed", "head", "proj"}
    assert torch.equal(model(ids), quantized_like(Tied(), model)(ids))
    # A weight that some layer keeps out of it stays as it is everywhere.
    two = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K))
    two[1].weight = two[0].weight
    autoquant(two, torch.randn(4, K), filter_fn=lambda m, n: n != "1", cache=False)
    assert specs(two) == {"0": None, "1": None, "2": Intx(8)} and two[1].weight is two[0].weight
    assert "tied to 1.weight, which is left out" in two.autoquant_report.skipped["0"]


def quantized_like(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict(), assign=True)
    return model


# Recording.


class Two(nn.Module):
    """A model without `len()`: compiled, it is neither true nor false."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Net(), Net()

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("how", ["wrapper", "in place", "part", "forward", "later"])
def test_recording_runs_eagerly(times, how):
    """Whichever way a model is compiled, its first call records every product and nothing compiles."""
    times[label(INT8)] = 0.5
    compiled = 0

    def backend(gm, inputs):
        nonlocal compiled
        compiled += 1
        return gm

    model = inner = Two()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want, x = copy.deepcopy(model), torch.randn(4, K)
    if how == "wrapper":
        model = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "part":
        model.a = torch.compile(model.a, backend=backend)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    given = model
    model = autoquant(model, filter_fn=lambda m, n: not n.endswith("side"), cache=False)
    assert model is given
    if how == "later":
        model = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert torch.equal(model(x), want(x))
        assert compiled == 0
        assert sum(spec == Intx(8) for spec in specs(inner).values()) == 4
        out = model(x)
        assert compiled == 1 and compute_error(want(x), out) > 30
    assert "finalize_autoquant" not in inner.__dict__ and ("forward" in inner.__dict__) == (how == "forward")
    report = model.autoquant_report
    assert sum(c.config is not None for c in report.choices) == 4 and report.mode == "compiled"
    # The plan fits the plain model.
    plain = Two()
    plain.load_state_dict(state)
    autoquant(plain, plan=report.plan)
    assert list(specs(plain).values()) == list(specs(inner).values())


def test_recording_inside_inference_mode(times):
    times[label(INT8)] = 0.5
    model, x = nn.Sequential(nn.Linear(K, K)), torch.randn(4, K)
    with torch.inference_mode():
        autoquant(model, x, cache=False)
    assert not model[0].weight.is_inference()
    assert model(x.requires_grad_()).requires_grad


def test_autocast_is_recorded(times):
    model = nn.Sequential(nn.Linear(K, K))
    with torch.autocast("cpu", torch.bfloat16):
        autoquant(model, torch.randn(4, K), cache=False)
    assert [p.autocast for p in times["asked"]] == [torch.bfloat16]


def test_layers_that_never_ran(times):
    times[label(INT8)] = 0.5
    model, x = Net(), torch.randn(4, K)
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "seen"}
    autoquant(model, cache=False)
    with pytest.raises(RuntimeError, match="no call reached side; call the model so that every layer runs"):
        model(x)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    model(x, side=True)  # it goes on recording
    assert specs(model) == dict.fromkeys(["up", "down", "side"], Intx(8))
    model = Net()
    with pytest.raises(RuntimeError, match="no call reached side"):
        autoquant(model, x, cache=False)
    assert left_as_it_was(model)
    model = autoquant(Net(), error_on_unseen=False, manual=True, cache=False)
    report = finalize_autoquant(model)
    assert len(report) == 0 and set(report.skipped) == {"up", "down", "side"}


def test_a_call_that_fails_counts_for_nothing(times):
    model = autoquant(Net(), manual=True, cache=False)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, K + 1))
    model(torch.randn(4, K), side=True)
    model.finalize_autoquant()
    assert {p.tokens for p in times["asked"]} == {4}


def test_calls_are_kept_by_what_they_ran(times, monkeypatch):
    """One of each kind, however many there were; a call that failed is none."""
    times[label(INT8)] = 0.5
    kept: list[tuple[int, int]] = []

    def compare(model, calls, devices, before, after):
        kept.extend((len(call.fresh()(lambda x, side=False: x)), call.count) for call in calls)
        return Comparison(1.0, 1.0, 0.0)

    monkeypatch.setattr(end_to_end, "compare", compare)
    model = autoquant(Net(), manual=True, cache=False)
    with pytest.raises(TypeError):
        model(torch.randn(4, K), True, "too much")
    for tokens, side in ((4, False), (4, False), (4, True), (1, False), (4, False)):
        model(torch.randn(tokens, K), side=side)
    model.finalize_autoquant()
    assert kept == [(4, 3), (4, 1), (1, 1)]


# What it promises.


def test_slower_end_to_end_is_taken_back(times, monkeypatch):
    """Half of the choices at a time, the least certain first, down to the original weights."""
    times[label(INT8)] = 0.5
    verdicts: list[Comparison] = []
    seen: list[int] = []

    def compare(model, calls, devices, before, after):
        before()
        assert set(specs(model).values()) == {None}
        after()
        seen.append(sum(s is not None for s in specs(model).values()))
        return verdicts[len(seen) - 1]

    monkeypatch.setattr(end_to_end, "compare", compare)
    slow, fast = Comparison(1.0, 1.5, 0.1), Comparison(1.0, 1.05, 0.1)
    x = torch.randn(4, K)
    for verdicts, left in (([slow, fast], 1), ([slow, slow], 0), ([fast], 3)):
        seen.clear()
        model = Net()
        weights = [m.weight for m in (model.up, model.down, model.side)]
        autoquant(model, {"x": x, "side": True}, cache=False)
        assert seen == [3, 1][: len(verdicts)]
        report = model.autoquant_report
        assert len(report) == left == sum(s is not None for s in specs(model).values())
        assert report.after_ms == (1.05 if left else 1.0) and len(report.notes) == sum(v is slow for v in verdicts)
        if not left:
            assert [model.up.weight, model.down.weight, model.side.weight] == weights


def test_the_model_is_intact_when_something_raises(times, monkeypatch):
    times[label(INT8)] = 0.5

    def compare(model, calls, devices, before, after):
        after()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(end_to_end, "compare", compare)
    model = Net()
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "seen"}
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="out of memory"):
        autoquant(model, {"x": torch.randn(4, K), "side": True}, cache=False)
    assert all(a is b for a, b in zip(model.parameters(), parameters)) and left_as_it_was(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    times["float32"] = "RuntimeError: no compiler"
    with pytest.raises(RuntimeError, match="up cannot be timed, not even as it is: RuntimeError: no compiler"):
        autoquant(model, {"x": torch.randn(4, K), "side": True}, cache=False)
    assert left_as_it_was(model)


def test_a_model_is_measured_as_it_runs(monkeypatch, tmp_path):
    """Eagerly where it is called eagerly, compiled where it is compiled; layers, whole model and kept timings alike."""
    layers: list[bool] = []
    wholes: list[bool] = []

    def time_products(product, rows, variants, compiler, model_bytes):
        def function() -> None: ...

        layers.append(compiler.compile(function) is function)
        assert compiler.is_eager == layers[-1]
        return {name: 1.0 if name == "float32" else 0.5 for name in variants}

    def compare(model, calls, devices, before, after):
        (call,) = calls
        wholes.append(not is_compiled(model if call.caller is None else call.caller))
        return Comparison(1.4, 22.6, 0.01)

    monkeypatch.setattr(timing, "time_products", time_products)
    monkeypatch.setattr(end_to_end, "compare", compare)
    x = torch.randn(4, K)
    with torch.no_grad():
        for make in (lambda m: m, lambda m: torch.compile(m, backend="eager"), in_place):
            model = make(nn.Sequential(nn.Linear(K, K)))
            eager = not is_compiled(model)
            autoquant(model, x, [INT8], cache=tmp_path)
            assert wholes.pop() == layers.pop() == eager and wholes == layers == []
            report = model.autoquant_report
            assert report.mode == ("eager" if eager else "compiled")
            # It was slower, so the original weights are back.
            assert len(report) == 0 and report.after_ms == 1.4 and "22.600 ms, before 1.400 ms" in report.notes[0]
            assert set(specs(model).values()) == {None}
        # A compiled function around the model counts, too.
        model = autoquant(nn.Sequential(nn.Linear(K, K)), candidates=[INT8], cache=tmp_path)
        torch.compile(lambda x: model(x))(x)
        assert model.autoquant_report.mode == "compiled" and wholes.pop() is False
    assert len(list(tmp_path.iterdir())) == 2  # eager, and compiled in the default mode


def test_each_call_is_repeated_as_it_was_made(monkeypatch):
    """As `generate` makes them: a prompt eagerly, and steps by a function that is compiled around the model, in some mode."""
    calls, modes = [], []

    def time_products(product, rows, variants, compiler, model_bytes):
        modes.append(compiler.key)
        return {name: 1.0 if name == "float32" else 0.5 for name in variants}

    def compare(model, made, devices, before, after):
        calls.extend((call.count, call.caller) for call in made)
        ran = []
        handle = model.register_forward_pre_hook(lambda *_: ran.append(torch.compiler.is_compiling()))
        for call in made:
            end_to_end._timed(model, call, devices, 1)
        handle.remove()
        assert ran == [False, True]
        return Comparison(2.0, 1.0, 0.01)

    monkeypatch.setattr(timing, "time_products", time_products)
    monkeypatch.setattr(end_to_end, "compare", compare)
    model = nn.Sequential(nn.Linear(K, K))
    autoquant(model, candidates=[INT8], cache=False, manual=True)
    step = torch.compile(lambda x: model(x), backend="eager")
    with torch.no_grad():
        model(torch.randn(16, K))
        for _ in range(3):
            step(torch.randn(1, K))
    model.finalize_autoquant()
    (prompts, eager), (steps, compiled) = calls
    assert (prompts, eager) == (1, None) and steps == 3
    assert compiled._orig_mod is model
    assert set(modes) == {None}  # the backend of the function, of which nothing more is known


def test_a_mode_of_the_code_around():
    from ao.quant.compiled import compiled_caller, compiler_of

    model, found = nn.Linear(K, K), []
    look = torch.compiler.disable(lambda: found.append(compiled_caller(model)))
    look()
    for mode in (None, "max-autotune"):
        torch.compile(lambda: look(), mode=mode)()
    nothing, default, tuned = found
    assert nothing is None and default._orig_mod is tuned._orig_mod is model
    assert compiler_of(default).key == "{}" and "max_autotune" in compiler_of(tuned).key


def test_wrappers_with_the_same_settings_share_a_graph():
    """There is one for each call that was recorded."""
    from ao.quant.compiled import compiled_caller

    model, found, counter = nn.Linear(K, K), [], CompileCounter()
    look = torch.compiler.disable(lambda: found.append(compiled_caller(model)))
    step = torch.compile(lambda: look(), backend=counter)
    step(), step()
    before = counter.frame_count
    for wrapper in found:
        wrapper(torch.ones(2, K))
    assert found[0] is not found[1] and counter.frame_count == before + 1


class Cache:
    """An object that a call changes, as a cache of keys and values is."""

    def __init__(self) -> None:
        self.keys = torch.arange(4.0).expand(2, 4)
        self.length = torch.zeros((), dtype=torch.int64)
        self.also = self.keys[:, 1:]

    def __call__(self) -> None:
        self.keys[0] += 1
        self.length += 1


def test_arguments_are_as_they_were_and_where_they_were():
    """A graph that reads a tensor where it lies can be replayed for the next copy of an object."""
    cache = Cache()
    call = recording.Call((cache,), {})
    seen: list[Cache] = []
    for _ in range(3):
        call.fresh()(lambda cache: (seen.append(cache), cache()))
        assert seen[-1].keys[1].tolist() == [1, 2, 3, 4] and seen[-1].also[0].tolist() == [2, 3, 4]
        assert seen[-1].length == 1 and seen[-1].keys.stride() == (0, 1)
    assert cache.length == 0 and len({id(c) for c in seen}) == 3
    for name in ("keys", "length", "also"):
        (place,) = {getattr(c, name).data_ptr() for c in seen}
        assert place != getattr(cache, name).data_ptr()


def in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def test_comparing_end_to_end_restores_the_model():
    """Buffers, random numbers and arguments are as before; the timings are of both sets of weights."""
    installed: list[nn.Parameter] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, K)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor, past: list[int]) -> Tensor:
            self.steps += 1
            past.append(len(past))
            return self.linear(x) + torch.rand(())

    model = Counting()
    one, two = nn.Parameter(torch.ones(K, K)), nn.Parameter(torch.zeros(K, K))
    weight = recording.Weight(one, [(model.linear, "linear")])
    model.forward = torch.compile(model.forward, backend="eager")
    past, x = [], torch.randn(2, K)
    call = recording.Call((x, past), {})

    def install(p: nn.Parameter) -> None:
        weight.install(p)
        installed.append(p)

    rng = torch.get_rng_state()
    with torch.no_grad():
        result = end_to_end.compare(model, [call], {x.device}, lambda: install(one), lambda: install(two))
    assert result.before > 0 and result.after > 0 and result.tolerance >= 0.01
    # Warm-up, rounds in which either is first, and the new weights last.
    assert [p is two for p in installed[:6]] == [False, True, False, True, True, False] and installed[-1] is two
    assert past == [] and model.steps == 0 and model.linear.weight is two
    assert torch.equal(torch.get_rng_state(), rng)
    assert Comparison(1.0, 1.2, 0.1).slower and not Comparison(1.0, 1.05, 0.1).slower


def test_real_run(tmp_path, monkeypatch, device):
    """Nothing made up: timed, compiled, checked, cached; and the same choices again from the cache and from the plan."""
    model = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)).to(device))
    x = torch.randn(4, 64, device=device)
    with torch.no_grad():
        want = model(x)
        plain = copy.deepcopy(model._orig_mod)
        again = copy.deepcopy(plain)
        assert autoquant(model, x, [INT8], cache=tmp_path) is model
        out = model(x)
    report = model.autoquant_report
    assert len(report.choices) == 2 and compute_error(want, out) > 30
    for choice in report.choices:
        (measured,) = choice.timings
        assert measured.tokens == 4 and all(0 < t < 1 for t in measured.seconds.values())
        assert measured.seconds.keys() == {"float32", "Int8WeightOnly"}
        assert choice.config == (INT8 if choice.label == "Int8WeightOnly" else None)
    if len(report):
        assert report.before_ms > 0 and report.after_ms > 0

    (file,) = tmp_path.iterdir()
    assert file.name.startswith("autoquant-") and len(json.loads(file.read_text())["seconds"]) == 2
    monkeypatch.setattr(timing, "time_products", None)  # whoever measures, fails
    monkeypatch.setattr(end_to_end, "compare", lambda *args: (args[-1](), Comparison(1.0, 1.0, 0.0))[1])
    autoquant(torch.compile(again), x, [INT8], cache=tmp_path)
    assert [c.timings for c in again.autoquant_report.choices] == [c.timings for c in report.choices]

    report.save_plan(tmp_path / "plan.json")
    autoquant(plain, plan=tmp_path / "plan.json")
    assert specs(plain) == specs(model._orig_mod)


def test_what_layers_meet_and_what_comes_before():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o, self.up, self.down, self.last = (nn.Linear(K, K) for _ in range(7))
            self.scale = nn.Parameter(torch.ones(K))

        def forward(self, x: Tensor) -> Tensor:
            h = F.layer_norm(x, (K,)) * 2 + 1
            x = x + self.o(torch.softmax(self.q(h) * self.k(h), -1) * self.v(h))
            h = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(
                x.dtype
            )  # RMSNorm, written out
            return self.last(x + self.down(F.gelu(self.up(h)) * 2))

    block = Block()
    weights, _ = recording.find_weights(block, None)
    recorder = recording.Recorder(weights)
    with recorder:
        block(torch.randn(2, 3, K))
    found = {w.names[0]: (p.tokens, p.sharing, p.after) for (w, p), count in recorder.calls.items() if count == 1}
    assert found == {
        **dict.fromkeys("qkv", (6, 3, "norm")), "o": (6, 1, ""), "up": (6, 1, "norm"), "down": (6, 1, "activation"),
        "last": (6, 1, ""),
    }  # fmt: skip
    for (w, product), count in recorder.calls.items():
        w.calls[product] += count
        w.forget_neighbours()
        assert [(p.sharing, p.after) for p in w.products()] == [(1, "")]


def test_timing_of_products(device):
    """Every variant gets a time or a reason."""
    from ao.quant.compiled import compiler_of

    linear = torch.compile(nn.Linear(K, K, device=device), backend="eager")
    product = Product(3, K, K, torch.float32, torch.float32, True, None, linear.weight.device)

    def fail() -> Tensor:
        raise ValueError("\n no such format\n")

    variants = {"float32": lambda: linear.weight, "int8": lambda: Intx(8).quantize(linear.weight), "broken": fail}
    for each in (product, dataclasses.replace(product, sharing=3, after="norm")):
        found = timing.time_products(
            each, torch.randn(2, K, device=device), variants, compiler_of(linear), 10 * 4 * K * K
        )
        assert found.pop("broken") == "ValueError: no such format"
        assert found.keys() == {"float32", "int8"} and all(0 < t < 1 for t in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_timers_keep_what_they_read():
    """A CUDA graph does not: it would replay over memory that is another tensor's by then, or nobody's."""
    from ao.quant.compiled import compiler_of

    device = torch.device("cuda", torch.cuda.current_device())
    product = Product(1, 512, 512, torch.bfloat16, torch.bfloat16, False, None, device)
    x, weight = torch.randn(1, 512, device=device).bfloat16(), torch.randn(512, 512, device=device).bfloat16()
    before = torch.cuda.memory_allocated()
    timer = timing._timer(product, x, weight, compiler_of(torch.compile(nn.Linear(2, 2))), 10 * weight.nbytes)
    assert torch.cuda.memory_allocated() - before >= 9 * weight.nbytes
    torch.cuda.empty_cache()
    assert timer() > 0


def test_the_compiler_of_a_model():
    from ao.quant.compiled import compiler_of

    keys = [
        compiler_of(m).key
        for m in (
            nn.Linear(K, K),
            torch.compile(nn.Linear(K, K)),
            torch.compile(nn.Linear(K, K), mode="max-autotune"),
            torch.compile(nn.Linear(K, K), mode="max-autotune-no-cudagraphs"),
            torch.compile(nn.Linear(K, K), backend="eager"),
        )
    ]
    assert keys[0] == "eager" and keys[1] == "{}" and keys[4] is None
    assert keys[2] == keys[3] and json.loads(keys[2])["max_autotune"] is True


# The cache.


def test_cache_survives_nonsense(times, tmp_path, monkeypatch):
    times[label(INT8)] = 0.5
    x = torch.randn(4, K)

    def run(candidates) -> list[Product]:
        times["asked"].clear()
        autoquant(nn.Sequential(nn.Linear(K, K)), x, candidates)
        return list(times["asked"])

    assert len(run([INT8])) == 1 and run([INT8]) == []
    assert len(run([INT8, DYNAMIC])) == 1 and run([INT8, DYNAMIC]) == []  # measured together, or not at all
    (file,) = (tmp_path / "cache").iterdir()
    for text in ("", "{", "[]", '{"seconds": 3}', '{"seconds": {"a": []}}', "\x00"):
        file.write_text(text)
        assert len(run([INT8])) == 1, text
        assert run([INT8]) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert len(run([INT8])) == 1 and len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setenv("AO_CACHE_DIR", str(file / "not a directory"))
    model = autoquant(nn.Sequential(nn.Linear(K, K)), x, [INT8])
    assert specs(model) == {"0": Intx(8)} and "timings are not kept" in model.autoquant_report.notes[0]


def test_cache_keys():
    product = Product(4, 64, 32, torch.bfloat16, torch.bfloat16, True, None, torch.device("cpu"))
    key = cache.product_key(product, 1000)
    assert "4 x 64 x 32, bfloat16 by bfloat16, autocast None, bias True, sharing 1, after nothing, model 768" in key
    assert cache.device_name(torch.device("cpu")) in key
    others = dataclasses.replace(product, sharing=3), dataclasses.replace(product, after="norm")
    assert len({key, cache.product_key(product, 4000), *(cache.product_key(p, 1000) for p in others)}) == 4


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("AO_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "ao"


# The plan.


def test_plan(times, tmp_path):
    times[label(INT8)] = 0.5
    path = tmp_path / "plan.json"
    model = autoquant(Net(), torch.randn(4, K), error_on_unseen=False, cache=False)
    model.autoquant_report.save_plan(path)
    assert json.loads(path.read_text()) == {"side": None, "up": INT8.to_dict(), "down": INT8.to_dict()}
    assert load_plan(path) == FqnToConfig({"side": None, "up": INT8, "down": INT8})
    for apply in (lambda m: autoquant(m, plan=path), lambda m: quantize_(m, load_plan(path))):
        other = Net()
        apply(other)
        assert specs(other) == specs(model)
    root = autoquant(nn.Linear(K, K), torch.randn(4, K), cache=False)
    root.autoquant_report.save_plan(path)
    assert autoquant(nn.Linear(K, K), plan=path).weight.spec == Intx(8)
    # By hand, with rules.
    other = autoquant(Net(), plan=FqnToConfig({"re:.*": Float8(), "side": None}))
    assert specs(other) == {"up": Float8(), "down": Float8(), "side": None}


def test_plan_that_does_not_fit(tmp_path):
    model = Net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for plan, message in (
        ({"up": INT8, "down": None, "slide": INT8}, "has no slide; the nearest names are side"),
        ({"up": INT8}, "it says nothing of down, side"),
        (
            {"up": Int4WeightOnlyConfig(group_size=48), "down": None, "side": None},
            "dim 1 of shape (64, 32) is not a multiple",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            autoquant(model, plan=FqnToConfig(plan))
    for text in ("[]", "nonsense", '{"up": {"type": "Nothing"}}', '{"up": 3}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match="plan.json holds no plan"):
            autoquant(model, plan=tmp_path / "plan.json")
    with pytest.raises(ValueError, match="filter_fn must be None with plan"):
        autoquant(model, plan=FqnToConfig({}), filter_fn=lambda m, n: True)
    assert same_state(model, state)


# What it refuses, and what it prints.


def test_refusals():
    model = Net()
    with pytest.raises(ValueError, match="default, int4, float8, all, got 'int9'"):
        autoquant(model, candidates="int9")
    with pytest.raises(TypeError, match="call it first"):
        autoquant(model, candidates=[Int8WeightOnlyConfig])
    with pytest.raises(TypeError, match="candidates must be configs"):
        autoquant(model, candidates=[FqnToConfig({})])
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got function"):
        autoquant(autoquant)
    with pytest.raises(ValueError, match="no linear layer to choose for"):
        autoquant(nn.Conv2d(1, 1, 1))
    quantized = nn.Sequential(nn.Linear(K, K))
    quantize_(quantized, INT8)
    with pytest.raises(ValueError, match="no linear layer to choose for; 0: it is quantized already"):
        autoquant(quantized)
    with pytest.raises(ValueError, match="on the meta device: load the weights first"):
        autoquant(nn.Linear(K, K, device="meta"))
    with pytest.raises(ValueError, match="not recording; call autoquant"):
        finalize_autoquant(model)
    autoquant(model, manual=True)
    with pytest.raises(ValueError, match="recording already"):
        autoquant(model)


def test_sets():
    assert all(
        label(a) == label(b)
        for a, b in zip(SETS["all"], [*ao.DEFAULT_INT4_AUTOQUANT_CLASS_LIST, *ao.OTHER_AUTOQUANT_CLASS_LIST])
    )
    assert (
        label(Int4WeightOnlyConfig(group_size=64)) == "Int4WeightOnly(group_size=64)"
        and label(Intx(3)) == "Intx(bits=3)"
    )
    model = nn.Sequential(nn.Linear(K, K))
    autoquant(model, candidates=["float8", INT4], manual=True, cache=False)
    # A CPU has no float8 arithmetic, so that only the weight-only format of the set is worth a try.
    session = model.finalize_autoquant.__self__
    assert list(candidates_on(session.candidates, torch.device("cpu"))) == ["Float8WeightOnly", label(INT4)]
    other = autoquant(nn.Sequential(nn.Linear(K, K)), qtensor_class_list=[INT4], set_inductor_config=True, manual=True)
    assert other.finalize_autoquant.__self__.candidates == [INT4]
    with pytest.raises(ValueError, match="has no format that cpu has arithmetic for"):
        autoquant(nn.Linear(K, K), candidates=[])


def test_report(times):
    times.update({label(INT8): 0.25e-6, (4, "float32"): 1e-6, (16, "float32"): 3e-6})
    model = nn.ModuleList([nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 2 * K), nn.Linear(K, K), nn.Linear(K, K)])
    model.forward = lambda x: model[2](model[1](model[0](x)))
    autoquant(
        model, manual=True, error_on_unseen=False, filter_fn=lambda m, n: n != "4", candidates=[INT8], cache=False
    )
    for batch in (4, 16, 16):
        model(torch.randn(batch, K))
    report = model.finalize_autoquant()
    assert [c.sqnr > 30 for c in report.choices] == [True] * 3
    assert (
        re.sub(r"\d\d\.\d$", "SQNR", str(report), flags=re.MULTILINE)
        == """\
layer              shape     M  calls  format   us   was   speed  SQNR dB
-------------------------------------------------------------------------
* (2)              32 x 32   4      2  int8    0.2   1.0   4.00x     SQNR
                            16      4          0.2   3.0  12.00x
*                  64 x 32   4      1  int8    0.2   1.0   4.00x     SQNR
                            16      2          0.2   3.0  12.00x
all linear layers                              2.2  21.0   9.33x
end to end: 2.000 ms before, 1.000 ms after, 2.00x, eager
skipped 1: 4: filter_fn leaves it out
skipped 1: 3: no call reached it"""
    )
