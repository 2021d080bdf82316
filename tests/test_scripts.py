"""The benchmark scripts: the Llama model they generate with, the files they write, and the page that is made from those."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import bench_linear  # noqa: E402
import bench_models  # noqa: E402
import formats  # noqa: E402
import generate  # noqa: E402
import headline_page  # noqa: E402
import llama  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import performance  # noqa: E402
import sparsity_page  # noqa: E402
import whole_models  # noqa: E402

import ao  # noqa: E402

CPU = torch.device("cpu")
CEILING = {"copy": 1e10, "read": 2e10, "float": 1e11, "int8": 1e11}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that were not measured, and graphs that run in eager mode."""
    monkeypatch.setattr(measure, "ceilings", lambda device: dict(CEILING))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_every_format_is_a_config():
    for name in formats.FORMATS:
        assert isinstance(formats.config_of(name), (ao.Config, ao.Spec)), name
    assert formats.config_of("bf16") is None
    assert formats.config_of("Intx(bits=5, block=(1, 64))") == ao.Intx(5, (1, 64))
    for wrong in ("int9", "Intx(", "torch.int8"):
        with pytest.raises(ValueError, match="format"):
            formats.config_of(wrong)


# The model.

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ],
    ids=["llama3", "tied"],
)
def test_logits_are_those_of_transformers(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            **changes,
        }
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    model = llama.load_model(tmp_path, CPU, torch.float32)
    model.make_cache(2, 40)
    ids = torch.randint(96, (2, 40))
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids, torch.arange(40)), expected, atol=2e-4, rtol=2e-4)
    assert llama.load_model(tmp_path, CPU, torch.bfloat16, layers=1).config.layers == 1


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="config.json must say model_type 'llama', got 'gpt2'"):
        llama.LlamaConfig.from_hf({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="rope_type must be 'default', 'linear' or 'llama3', got 'yarn'"):
        llama.LlamaConfig.from_hf(
            {"model_type": "llama", "num_attention_heads": 4, "rope_parameters": {"rope_type": "yarn"}}
        )


@torch.no_grad()
def test_tokens_one_at_a_time_equal_tokens_at_once():
    model = llama.random_model(replace(llama.SHAPES["tiny"], tied=False), CPU, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(512, (3, 12))
    model.make_cache(3, 20)
    at_once = model(ids, torch.arange(12))
    model.make_cache(3, 20)
    first = model(ids[:, :5], torch.arange(5))
    rest = [model(ids[:, i : i + 1], torch.tensor([i]), last=True) for i in range(5, 12)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), at_once, atol=1e-4, rtol=1e-4)


def test_sample():
    logits = torch.randn(4, 50)
    assert torch.equal(generate.sample(logits, 0, None), logits.argmax(-1, keepdim=True))
    assert torch.equal(generate.sample(logits, 0.5, 1), logits.argmax(-1, keepdim=True))
    drawn = generate.sample(torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1).expand(20000, 3), 1.0, None)
    assert drawn.max() == 1
    assert drawn.float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.02)


# The programs.


def run_generate(*words: str, path: Path, shape: str = "tiny") -> list[dict[str, object]]:
    args = generate.parse(["--shape", shape, "--json", str(path), "--repeats", "1", *words])
    return generate.main(args)


def test_generate(tmp_path, quick):
    path = tmp_path / "generate-cpu.json"
    words = ["--device", "cpu", "--new-tokens", "4", "--prompt-length", "8", "--format", "bf16", "int8"]
    rows = run_generate(*words, "--compile-mode", "none", "--batch", "2", path=path)
    run_generate(*words, "--compile-mode", "none", "--batch", "2", path=path)
    assert [row["format"] for row in rows] == ["bf16", "int8"]
    assert rows[1]["model_bytes"] < rows[0]["model_bytes"]
    assert all(row["decode_tokens_per_s"] > 0 for row in rows)
    run_generate(*words, "--regional", "--quantize-head", path=path)
    data = json.loads(path.read_text())
    assert [run["settings"]["batch"] for run in data["runs"]] == [2, 1]  # the same settings once
    assert data["runs"][1]["rows"][1]["model_bytes"] < rows[1]["model_bytes"]
    assert str(tmp_path) not in path.read_text()


def test_generated_tokens_do_not_depend_on_the_compiler(quick, monkeypatch):
    monkeypatch.setitem(llama.SHAPES, "tiny", replace(llama.SHAPES["tiny"], tied=False))  # tied, it repeats one token
    found = []
    for words, graphs in ((["--compile-mode", "none"], 0), (["--regional"], 3), (["--compile-prefill"], 2)):
        before = measure.graphs_compiled()
        args = generate.parse(["--shape", "tiny", "--device", "cpu", "--new-tokens", "6", *words])
        options, _ = generate.compiler_options(args)
        generator = generate.build(args, "int8", generate.prompt_of(args)[0], options)
        with torch.no_grad():
            generator.generate()
        found.append(generator.tokens)
        assert measure.graphs_compiled() - before == graphs  # --regional: a prompt, a token, and the head
    assert found[0][0, 128:].unique().numel() > 2
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_generate_with_a_quantized_cache(tmp_path, quick):
    """The prompt comes in chunks, with either cache; what the caches hold is counted."""
    words = (
        "--context",
        "50",
        "--prompt-chunk",
        "16",
        "--new-tokens",
        "4",
        "--formats",
        "bf16",
        "--compile-mode",
        "none",
    )
    plain, quantized = (run_generate(*words, "--kv-cache", c, path=tmp_path / "runs.json")[0] for c in ("bf16", "int8"))
    assert "failed" not in quantized and 0.5 < quantized["cache_bytes"] / plain["cache_bytes"] < 0.7
    args = [generate.parse(["--shape", "tiny", "--device", "cpu", *words, "--prompt-chunk", n]) for n in ("7", "46")]
    texts = []
    for each in args:
        generator = generate.build(each, "bf16", generate.prompt_of(each)[0], {})
        with torch.no_grad():
            generator.generate()
        texts.append(generator.tokens)
    assert torch.equal(*texts)
    with pytest.raises(SystemExit):
        generate.parse(["--shape", "tiny", "--kv-cache", "int5"])


def test_generate_reports_what_fails(tmp_path, quick):
    words = ["--device", "cpu", "--new-tokens", "0", "--format", "Intx(bits=4, block=(1, 96))", "int8"]
    rows = run_generate(*words, path=tmp_path / "generate-cpu.json")
    assert "is not a multiple" in rows[0]["failed"]
    assert rows[1]["quantize_s"] > 0
    assert "decode_tokens_per_s" not in rows[1]


BENCH = ["--device", "cpu", "--tokens", "1", "3", "--shapes", "64x128", "--memory", "0.0001", "--check"]


def test_bench_linear(tmp_path, quick):
    path = tmp_path / "linear-cpu.json"
    words = [*BENCH, "--json", str(path)]
    bench_linear.main(bench_linear.parse([*words, "--formats", "int8", "Intx(bits=4, block=(1, 96))"]))
    data = performance.read(path)
    rows = {(r["tokens"], r["format"]): r for r in data["rows"]}
    assert list(rows) == [(m, f) for f in ("Intx(bits=4, block=(1, 96))",) for m in (1, 3)] + [
        (m, f) for m in (1, 3) for f in ("bf16", "int8")
    ]
    for m in (1, 3):
        assert "is not a multiple" in rows[m, "Intx(bits=4, block=(1, 96))"]["failed"]
        good = rows[m, "int8"]
        assert good["error"] < 4e-3
        assert good["us"] > 0
        assert good["bf16_us"] == rows[m, "bf16"]["us"]
        moved = 64 * 128 + 64 * 4 + 2 * m * (64 + 128)
        assert good["floor_us"] == pytest.approx(1e6 * max(moved / 2e10, 2 * m * 64 * 128 / 1e11))
        assert good["copies"] > 1

    # What is there is left alone, what failed is tried again, what is new is added.
    bench_linear.main(bench_linear.parse([*words, "--resume", "--formats", "int8", "float8"]))
    again = performance.read(path)
    kept = {(r["tokens"], r["format"]): r for r in again["rows"]}
    assert kept[1, "int8"] == rows[1, "int8"]
    assert kept[1, "float8"]["run"] == 1
    assert len(again["runs"]) == 2
    assert bench_linear.missing(bench_linear.parse([*words, "--formats", "int8"]), "64x128", again["rows"]) == []


def test_bench_linear_compares_with_peers(tmp_path, quick, monkeypatch):
    def broken(weight, name):
        raise RuntimeError("no kernel\nfor this chip")

    def plain(weight, name):
        return peers._layer(weight) if name == "int8" else None

    monkeypatch.setattr(peers, "PEERS", {"plain": plain, "broken": broken, "absent": broken})
    monkeypatch.setattr(peers, "version", lambda name: None if name == "absent" else "1.0")
    path = tmp_path / "linear-cpu.json"
    words = [*BENCH, "--json", str(path), "--formats", "int8", "float8", "--peers", "plain", "broken", "absent"]
    bench_linear.main(bench_linear.parse(words))
    data = performance.Linear(performance.read(path))
    assert data.runs[0]["peers"] == {"plain": "1.0", "broken": "1.0"}
    assert data.over("64x128", 1, "int8", "plain") > 0
    assert data.get("64x128", 1, "int8", "plain")["error"] < 4e-3
    assert data.get("64x128", 1, "float8", "plain")["absent"]
    assert data.get("64x128", 3, "int8", "broken")["failed"] == "RuntimeError: no kernel"
    assert "no kernel" in performance.peers(data)
    args = bench_linear.parse(words)
    args.peers.remove("absent")
    assert bench_linear.missing(args, "64x128", data.rows.values()) == []


def test_peers_cannot_change_our_settings():
    import torch._inductor.config as inductor

    before = inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    with peers.settings_restored():
        inductor.coordinate_descent_tuning = True
        torch.set_float32_matmul_precision("high")
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (bench_linear, ["--formats", "int9"], "unknown format 'int9'"),
        (bench_linear, ["--shapes", "4096"], "a shape must be like 4096x14336, got '4096'"),
        (bench_linear, ["--peers", "nobody"], "unknown peer nobody"),
        (bench_linear, ["--resume"], "--resume needs --json FILE"),
        (generate, ["--shape", "tiny", "--prompt", "x"], "--prompt needs --model DIR"),
        (generate, ["--shape", "tiny", "--new-tokens", "1"], "--new-tokens must be 2 or more"),
        (generate, ["--model", "nowhere"], "nowhere has no config.json"),
    ],
)
def test_arguments_are_checked(program, words, message, capsys):
    with pytest.raises(SystemExit):
        program.parse(words)
    assert message in capsys.readouterr().err


# The page.


def linear_data(times: dict[tuple[int, str], float]) -> dict[str, object]:
    run = {"device": "a chip", "torch": "2", "date": "2030-01-01", "command": "scripts/x", "ceilings": CEILING}
    rows = [
        {
            "shape": "4096x4096",
            "tokens": m,
            "format": name,
            "library": "ao",
            "us": us,
            "bf16_us": times[m, "bf16"],
            "floor_us": 1.0,
            "run": 0,
        }
        for (m, name), us in times.items()
    ]
    return {"runs": [run], "rows": rows}


def test_the_page_is_filled_and_its_text_kept(tmp_path):
    page = tmp_path / "performance.md"
    text = (ROOT / "docs" / "performance.md").read_text()
    page.write_text(text + "\nWritten by hand.\n")
    times = {(1, "bf16"): 40.0, (1, "int8"): 20.0, (1, "int4-g128"): 20.0, (16, "bf16"): 40.0, (16, "int8"): 50.0}
    (tmp_path / "linear-cpu.json").write_text(json.dumps(linear_data(times)))
    performance.write(page, tmp_path)
    made = page.read_text()
    assert made.endswith("\nWritten by hand.\n")
    verdicts = {
        cells[1]: cells[2:5] for line in made.splitlines() if len(cells := [c.strip() for c in line.split("|")]) == 6
    }
    assert verdicts["CPU, M=1, int8, speed of bf16"] == ["at least 1.7x", "2.00x (M=1, 4096x4096)", "met, 18% above"]
    assert verdicts["CPU, M=1, int4 g128, speed of bf16"][2] == "**missed**, 9% below"
    assert verdicts["CPU, M=16, int8, time of bf16"] == [
        "at most 1x",
        "1.25x (M=16, 4096x4096)",
        "**missed**, 25% above",
    ]
    assert verdicts["CPU, M=256, int8, time of bf16"][1] == "not measured"
    assert "**0.80x**, 2%" in made  # a loss
    assert "2.00x, 5%" in made
    performance.write(page, tmp_path, check=True)
    page.write_text(made.replace("**0.80x**", "1.80x"))
    with pytest.raises(SystemExit, match="the tables of performance.md are stale"):
        performance.write(page, tmp_path, check=True)


def test_the_worst_of_two_cards_counts(tmp_path):
    for kind, us in (("cuda", 10.0), ("h200", 16.0)):
        (tmp_path / f"linear-{kind}.json").write_text(json.dumps(linear_data({(1, "bf16"): 40.0, (1, "int8"): us})))
    (line,) = [line for line in performance.targets(tmp_path).splitlines() if "GPU, M=1, int8, speed" in line]
    assert "2.50x (M=1, 4096x4096, a chip)" in line


def test_a_format_that_fails_misses_its_target():
    data = linear_data({(1, "bf16"): 40.0})
    data["rows"].append(
        {"shape": "4096x4096", "tokens": 1, "format": "int8", "library": "ao", "failed": "E: no", "run": 0}
    )
    table = performance.Linear(data)
    slow = performance.Target("t", 1.7, lambda: [(table.speed("4096x4096", 1, "int8"), "M=1")])
    assert slow.cells() == ["t", "at least 1.7x", "does not run (M=1)", "**missed**"]
    assert "`int8: E: no` at M=1, 4096x4096" in performance.linear(table, "")


def test_the_page_is_what_the_numbers_say():
    performance.write(performance.PAGE, performance.MEASURED, check=True)


# On a GPU.

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_bench_linear_on_a_gpu(tmp_path):
    path = tmp_path / "linear-cuda.json"
    words = ["--device", "cuda", "--tokens", "1", "16", "--shapes", "512x1024", "--check", "--json", str(path)]
    bench_linear.main(bench_linear.parse([*words, "--formats", "int8", "int4-g128", "float8-dynamic"]))
    rows = performance.read(path)["rows"]
    assert len(rows) == 8
    assert [r for r in rows if "us" not in r] == []
    assert all(r["error"] < (0.06 if r["format"] == "float8-dynamic" else 5e-3) for r in rows)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("words", [["--regional"], ["--capture"], ["--compile-mode", "reduce-overhead"]])
def test_generate_on_a_gpu(words):
    found = []
    for how in (["--compile-mode", "none"], words):
        args = generate.parse(["--shape", "tiny", "--device", "cuda", "--new-tokens", "8", *how])
        options, _ = generate.compiler_options(args)
        generator = generate.build(args, "int8", generate.prompt_of(args)[0], options)
        with torch.no_grad():
            for _ in range(3):
                generator.generate()
        assert (generator.graph is not None) == (how != ["--compile-mode", "none"] and "reduce-overhead" not in how)
        found.append(generator.tokens.cpu())
    # One greedy token that differs by rounding would change all that follow, so the first two are compared.
    assert torch.equal(found[0][:, :130], found[1][:, :130])


@pytest.mark.parametrize(
    "name",
    ["sam-vit-h", "vit-l", "dinov2-l", "sdxl", "flux", "whisper-encoder", "whisper-decode", "llama-prefill"],
)
def test_whole_models(name, tmp_path):
    """Each model in small: a row in float32 and bfloat16, whose outputs are close, and the ladder of both."""
    if name in ("sdxl", "flux"):
        pytest.importorskip("diffusers")
    args = bench_models.parse(["--small", "--models", name, "--batch", "2", "--calls", "1", "--device", "cpu"])
    rows = [bench_models.Rung(name, rung, 2, tmp_path, args).row() for rung in ("bf16", "float32")]
    assert [row["rung"] for row in rows] == ["bf16", "float32"] and rows[1]["sqnr_db"] > 10
    lines = bench_models.table(rows, 2).splitlines()
    assert len(lines) == 4 and lines[3].split("|")[3].strip() == "1.00"


@pytest.mark.parametrize("name", ["sam-vit-h", "sdxl"])
def test_weights_of_a_folder(name, tmp_path):
    """What its library saved there runs; a part of it, where the model is one."""
    if name == "sdxl":
        pytest.importorskip("diffusers")
    case = whole_models.MODELS[name]
    with torch.random.fork_rng():
        saved = case.build(True, None)
        saved.save_pretrained(tmp_path)
    words = ["--small", "--models", name, "--calls", "1", "--device", "cpu", "--model"]
    rung = bench_models.Rung(name, "bf16", 1, tmp_path, bench_models.parse([*words, str(tmp_path)]))
    pairs = zip(rung.module.parameters(), saved.get_submodule(case.part).parameters(), strict=True)
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16()) for p, q in pairs)
    for wrong in ([*words, str(tmp_path / "none")], [*words, str(tmp_path), "--models", name, "vit-l"]):
        with pytest.raises(SystemExit):
            bench_models.parse(wrong)


@pytest.mark.parametrize("models", [["vit-l"], pytest.param(["vit-l", "dinov2-l"], marks=pytest.mark.slow)], ids=len)
def test_rungs_get_ready_side_by_side(models, tmp_path, capfd):
    """Four at once, of one model or two: all have rows, in the order asked for, and one that fails leaves others alone."""
    file = tmp_path / "models.json"
    words = [
        "--small",
        "--models",
        *models,
        "--batch",
        "2",
        "--calls",
        "1",
        "--device",
        "cpu",
        "--at-once",
        "4",
    ]
    wrong = "Intx(bits=4, block=(1, 7))"
    assert bench_models.main([*words, "--rungs", wrong, "float32", "bf16", "--json", str(file)]) == 0
    runs = json.loads(file.read_text())["models"]
    assert len(runs) == len(models)
    for run in runs.values():
        rows = {row["rung"]: row for row in run["rows"]}
        assert set(rows) == {"float32", "bf16"} and rows["float32"]["sqnr_db"] > 10 and "first_s" not in rows["bf16"]
        assert list(run["errors"]) == [f"{wrong}, batch 2"] and "no layer" in run["errors"][f"{wrong}, batch 2"]
    lines = [line.split("|")[1].strip() for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert [lines[i + 2 : i + 4] for i in range(0, len(lines), 4)] == [["float32", "bf16"]] * len(models)


def test_a_rung_of_another_library(tmp_path, monkeypatch):
    """Its layers get the weights and biases of those that the format is for."""

    def halves(weight, name):
        if name != "int8":
            return None
        layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight = torch.nn.Parameter(weight / 2, requires_grad=False)
        return torch.nn.Sequential(layer)

    monkeypatch.setitem(bench_models.PEERS, "halves", halves)
    words = ["--small", "--models", "vit-l", "--batch", "1", "--calls", "1", "--device", "cpu"]
    args = bench_models.parse([*words, "--rungs", "halves:int8"])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)
    made, own = (bench_models.Rung("vit-l", rung, 1, tmp_path, args) for rung in ("halves:int8", "bf16"))
    pairs = [
        (m, own.module.get_submodule(name))
        for name, m in made.module.named_modules()
        if isinstance(m, torch.nn.Linear) and not torch.equal(m.weight, own.module.get_submodule(name).weight)
    ]
    assert len(pairs) == made.row()["layers"] > 0
    assert all(torch.equal(m.weight, o.weight / 2) and torch.equal(m.bias, o.bias) for m, o in pairs)
    with pytest.raises(ValueError, match="halves has no int4-g128"):
        bench_models.Rung("vit-l", "halves:int4-g128", 1, tmp_path, args)
    with pytest.raises(SystemExit):
        bench_models.parse([*words, "--rungs", "halves:int9"])


def test_a_rung_whose_process_dies_or_is_late_is_an_error(tmp_path):
    args = bench_models.parse(["--small", "--models", "vit-l", "--batch", "2", "--calls", "1", "--device", "cpu"])
    process = bench_models.Process("vit-l", "bf16", 2, tmp_path, args)
    process.process.kill()
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        process.answer()
    process.end()
    late = bench_models.Process("vit-l", "bf16", 2, tmp_path, args)
    with pytest.raises(RuntimeError, match="not ready after 0 s"):
        late.answer(patience=0)
    late.end()


@pytest.mark.parametrize("name", ["vit-l", "mixtral-decode"])
@pytest.mark.parametrize("rung", ["2:4 int8-dynamic", "block-sparse"])
def test_sparse_rungs_leave_what_does_not_fit(tmp_path, monkeypatch, name, rung):
    """Experts, routers and odd shapes stay as they are."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    args = bench_models.parse(["--small", "--models", name, "--calls", "1", "--device", "cpu"])
    made = bench_models.Rung(name, rung, 1, tmp_path, args)
    quantized = [n for n, p in made.module.named_parameters() if isinstance(p, ao.QTensor)]
    assert len(quantized) == made.facts["layers"] > 4 and not any("expert" in n or "gate." in n for n in quantized)


def test_only_our_rungs_fuse(tmp_path, monkeypatch):
    """What others' rungs show is what they give."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    args = bench_models.parse(["--small", "--models", "sam-vit-h", "--calls", "1", "--device", "cpu"])
    for rung in ("bf16", "compiled", "int8-dynamic"):
        layer = bench_models.Rung("sam-vit-h", rung, 1, tmp_path, args).module.layers[0].attn
        assert hasattr(layer, "own_class") == (rung == "int8-dynamic")


def test_random_models_have_one_set_of_weights_in_every_dtype():
    """bfloat16 is float32, rounded."""
    one, other = (
        whole_models.random_model(whole_models.MODELS["mixtral-decode"], True, None, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(p.bfloat16(), q), name
        if p.dim() > 1:
            assert 0.8 < p.square().sum(-1).mean() < 1.2, name


def test_the_page_of_sparsity_is_what_was_measured(tmp_path):
    sparsity_page.write(sparsity_page.PAGE, sparsity_page.MEASURED, check=True)
    page = tmp_path / "sparsity.md"
    page.write_text(sparsity_page.PAGE.read_text().replace("| bf16 dense", "| nothing", 1))
    with pytest.raises(SystemExit, match="stale"):
        sparsity_page.write(page, sparsity_page.MEASURED, check=True)


def test_whole_models_are_drawn(tmp_path):
    """A panel for each model and batch size with a compiled bf16 rung, and how fast the others are beside it."""
    pytest.importorskip("matplotlib")
    rows = [{"batch": 8, "rung": "compiled", "ms": 3.0}, {"batch": 8, "rung": "int8", "ms": 2.0}]
    models = {"vit-l": {"rows": rows}, "flux": {"rows": rows[1:]}}
    bench_models.draw(models, tmp_path / "new" / "models.svg")
    drawn = (tmp_path / "new" / "models.svg").read_text()
    assert "vit-l, batch 8" in drawn and ">1.50<" in drawn and "flux" not in drawn


def test_the_page_of_whole_models(tmp_path):
    data = json.loads(headline_page.MEASURED.read_text())
    headline_page.write(headline_page.PAGE, data, check=True)
    row = {"batch": 8, "rung": "bf16", "ms": 1.0, "run": 0}
    small = {
        "runs": [{"date": "first"}],
        "models": {"vit-l": {"rows": [row, {**row, "rung": "compiled"}, {**row, "batch": 1}]}},
    }
    for date, rungs in (("second", ["bf16", "int8"]), ("third", ["bf16", "int8", "int4"])):
        rows = [{**row, "rung": rung} for rung in rungs]
        headline_page.add(small, {"runs": [{"date": date}], "models": {"vit-l": {"rows": rows}}})
    ladders = {
        (batch, small["runs"][run]["date"]): [each["rung"] for each in rows]
        for (batch, run), rows in headline_page.by_ladder(small["models"]["vit-l"]["rows"]).items()
    }
    # The third has all that the second has, and not all of the first.
    first = {(1, "first"): ["bf16"], (8, "first"): ["bf16", "compiled"]}
    assert ladders == {**first, (8, "third"): ["bf16", "int8", "int4"]}
    data["models"]["vit-l"]["rows"][0]["ms"] += 1
    with pytest.raises(SystemExit, match="stale"):
        headline_page.write(headline_page.PAGE, data, check=True)
