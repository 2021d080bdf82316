"""eval_lm.py, qat_lm.py and accuracy.py, on a tiny model of random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import accuracy  # noqa: E402
import eval_lm  # noqa: E402
import four_bits  # noqa: E402
import lm_text  # noqa: E402
import qat_lm  # noqa: E402
from tables import fill  # noqa: E402

TEXTS = ["the cat sat on the mat . " * 40, "a dog ran in the park , and the cat sat . " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a Llama of two layers and a tokenizer of words, and text beside it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("lm")
    words = {word: i for i, word in enumerate(["<end>", "?", *sorted({w for t in TEXTS for w in t.split()})])}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2 if "embed" in name else p.shape[1] ** -0.5)
    model.save_pretrained(path)
    (path / "text.json").write_text(json.dumps(TEXTS))
    (path / "more.txt").write_text(TEXTS[1])
    return path


def words(folder: Path, *more: str) -> list[str]:
    return ["--model", str(folder), "--text", str(folder / "text.json"), "--window", "32", "--dtype", "float32", *more]


def test_texts(folder):
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text("x = 1")
    (folder / "code" / "b.py").write_bytes(b"\xff\xfe")
    assert lm_text.texts_of([str(folder / "text.json"), str(folder / "more.txt"), str(folder / "code")]) == [
        *TEXTS,
        TEXTS[1],
        "x = 1",
    ]
    library = lm_text.texts_of([lm_text.STDLIB])
    assert len(library) > 100 and library == lm_text.texts_of([lm_text.STDLIB])
    assert max(map(len, library)) <= lm_text.LARGEST
    with pytest.raises(ValueError, match="must be a JSON list of strings"):
        lm_text.texts_of([str(folder / "config.json")])
    with pytest.raises(ValueError, match="has no .py, .txt or .md file"):
        lm_text.texts_of([str(folder / "code")], exclude=["a.py", "b.py"])


def test_eval_lm(folder, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    formats = ("--formats", "int3-g32", "Intx(4, (1, 32))", "--calibration", str(folder / "text.json"))
    more = ("--recipes", "rtn", "GPTQ(rounds=1)", "--layers", "--divergence", "--json", str(out))
    eval_lm.main(words(folder, *formats, *more))
    printed = capsys.readouterr().out
    assert "closed" in printed and "model.layers.1.mlp.down_proj" in printed
    data = json.loads(out.read_text())
    rows = {(row["format"], row["recipe"]): row for row in data["rows"]}
    assert len(rows) == 4 and data["runs"][0]["tokens"] == 31 * (sum(len(t.split()) + 1 for t in TEXTS) // 32)
    for name in ("int3-g32", "Intx(4, (1, 32))"):
        assert rows[name, "GPTQ(rounds=1)"]["divergence"] < rows[name, "rtn"]["divergence"]
        assert len(rows[name, "rtn"]["layers"]) == 14
    assert rows["int3-g32", "rtn"]["bits"] == 3 + 40 / 32 and rows["int3-g32", "GPTQ(rounds=1)"]["bits"] == 4
    assert "/" not in data["runs"][0]["command"].removeprefix("scripts/")
    # Adding to the file replaces what was measured anew, and keeps the rest.
    eval_lm.main(words(folder, "--formats", "int3-g32", "--recipes", "rtn", "--windows", "3", "--json", str(out)))
    again = json.loads(out.read_text())
    assert len(again["rows"]) == 4 and len(again["runs"]) == 2
    assert {row["run"] for row in again["rows"]} == {0, 1}


def test_eval_lm_with_quantized_keys_and_values(folder, tmp_path):
    """The weights stay as they are; a cache of more bits is nearer to the original."""
    out = tmp_path / "numbers.json"
    eval_lm.main(words(folder, "--kv-cache", "int8", "int4", "--divergence", "--json", str(out)))
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["KV cache int8", "KV cache int4"]
    assert 0 <= rows["KV cache int8"]["divergence"] < rows["KV cache int4"]["divergence"]
    assert rows["KV cache int8"]["bits"] > 8 > rows["KV cache int4"]["bits"]


def test_perplexity_is_that_of_the_model(folder):
    what = eval_lm.LanguageModel(folder, "float32", "cpu", 16)
    ids, model = torch.randint(2, 12, (9, 16)), what.load()
    loss = torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in ids]).mean()
    found, kl = eval_lm.perplexity(model, ids, what.load())
    assert found == pytest.approx(float(loss.exp()), rel=1e-4) and abs(kl) < 1e-5


def test_rotation(folder, capsys):
    eval_lm.main(words(folder, "--formats", "float8", "--recipes", "rtn", "--rotate"))
    printed = capsys.readouterr().out
    assert "rotation+rtn" in printed


def test_arguments_are_checked(folder, tmp_path):
    for wrong in (
        ["--formats", "int9"],
        ["--formats", "bf16"],
        ["--recipes", "gtpq"],
        ["--kv-cache", "int5"],
        ["--calibration", str(tmp_path / "none")],
    ):
        with pytest.raises(SystemExit, match="error: "):
            eval_lm.main(words(folder, *wrong))
    with pytest.raises(SystemExit, match="has no config.json"):
        eval_lm.main(["--model", str(tmp_path), "--text", str(folder / "more.txt")])


def test_qat_lm(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        qat_lm, "train", lambda distill, data, end: sum(bool(distill.step(data[i : i + 4], 1.0)) for i in range(6))
    )
    out = tmp_path / "numbers.json"
    train = ("--train", str(folder / "more.txt"), "--format", "int2-g32", "--calibration-windows", "4", "--lr", "1e-3")
    qat_lm.main(words(folder, *train, "--json", str(out), "--save", str(tmp_path / "model.safetensors")))
    assert "of the distance closed" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["recipe"] == "qat from gptq" and row["bits"] == 3 and row["rounded"] > 0
    saved = str(tmp_path / "model.safetensors")
    qat_lm.main(words(folder, "--format", "int2-g32", "--load", saved, "--json", str(tmp_path / "again.json")))
    (again,) = json.loads((tmp_path / "again.json").read_text())["rows"]
    assert again["perplexity"] == row["perplexity"] and again["divergence"] == row["divergence"] > 0


def test_the_page_is_filled(tmp_path):
    common = {"format": "int3-g32", "bits": 4.0, "seconds": 1.0, "cpu_seconds": 9.0, "run": 0}
    rows = [
        {**common, "recipe": recipe, "perplexity": p, "divergence": d}
        for recipe, p, d in (("rtn", 20.0, 0.2), ("hqq", 16.0, 0.1), ("gptq", 12.0, 0.05))
    ]
    run = {
        "perplexity": 10.0,
        "dtype": "bfloat16",
        "tokens": 100,
        "device": "CPU",
        "torch": "2",
        "date": "today",
        "command": "x",
    }
    for name in ("lm", "unseen"):
        (tmp_path / f"accuracy-{name}.json").write_text(json.dumps({"runs": [run], "rows": rows}))
    trained = {
        **common,
        "recipe": "qat from gptq",
        "perplexity": 11.0,
        "divergence": 0.1,
        "rounded": 20.0,
        "tokens": 1e6,
    }
    (tmp_path / "accuracy-qat.json").write_text(json.dumps({"runs": [run], "rows": [trained]}))
    peer = [{"format": "int3-g32", "recipe": "llm-compressor, GPTQ", "failed": "ImportError: no", "run": 0}]
    (tmp_path / "accuracy-peers.json").write_text(json.dumps({"runs": [run], "rows": peer}))
    page, readme = tmp_path / "accuracy.md", tmp_path / "README.md"
    names = ("targets", "plot", "recipes", "unseen", "steps", "qat", "peers")
    page.write_text("before\n" + "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names) + "after\n")
    readme.write_text("<!-- table: accuracy -->\n<!-- end -->\n")
    accuracy.write(page, readme, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "30% closed" in text and " 40% " in text and " 80% " in text and "not measured" in text
    assert "on all the text" in text and " 90% " in text
    assert "does not run: ImportError: no" in text and "16.00" in readme.read_text()
    accuracy.write(page, readme, tmp_path, check=True)
    page.write_text(text.replace("16.00", "17.00"))
    with pytest.raises(SystemExit, match="stale"):
        accuracy.write(page, readme, tmp_path, check=True)


def test_the_page_is_what_the_numbers_say():
    accuracy.write(accuracy.PAGE, accuracy.README, accuracy.MEASURED, check=True)


def test_the_table_of_four_bits(tmp_path):
    """As the numbers say; what was not measured has a dash."""
    fill(four_bits.PAGE, {"four-bits": four_bits.four_bits}, True)
    lines = four_bits.four_bits(tmp_path).splitlines()
    assert "Not measured." in lines and any("NVFP4" in line and " 4.50 |" in line for line in lines)
