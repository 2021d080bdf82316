"""Arguments that cannot be meant: found before any work, in one line, with exit status 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")

from ao.integrations import folder_quantizer, model_folder
from ao.integrations.command_line.program import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder that nobody gets to load."""

    def work(*args, **kwargs):
        raise AssertionError("work began")

    for module, name in (
        (model_folder, "load_model"),
        (folder_quantizer, "quantize_folder"),
        (folder_quantizer, "quantize_folder_in_memory"),
    ):
        monkeypatch.setattr(module, name, work)
    tokenizers = pytest.importorskip("tokenizers")
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 64})
    )
    header = json.dumps(
        {"model.layers.0.mlp.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    ).encode()
    (made / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    words = tokenizers.models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(made / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("word " * 20)
    (tmp_path / "short.txt").write_text("word")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    monkeypatch.chdir(tmp_path)
    return made


ABSENT = "cuda" if not torch.cuda.is_available() else f"cuda:{torch.cuda.device_count()}"
QUANTIZE = "quantize model out --config int8 "
CASES = {
    "--report /proc/r.html": (QUANTIZE, "cannot be written"),
    "--report text.txt/r.html": (QUANTIZE, "cannot be written"),
    "--report other": (QUANTIZE, "is a folder"),
    "--report /dev/null": (QUANTIZE, "is no ordinary file"),
    f"--device {ABSENT}": (QUANTIZE, f"--device {ABSENT} is not there"),
    "--device meta": (QUANTIZE, "computes nothing"),
    "--device nonsense": (QUANTIZE, "--device nonsense is not there"),
    "--text absent.txt": (QUANTIZE, "does not exist"),
    "--text other": (QUANTIZE, "is a folder"),
    "--text short.txt": (QUANTIZE, "fewer than two tokens"),
    "--text broken.json": (QUANTIZE, "broken.json is no JSON"),
    "--text bytes.txt": (QUANTIZE, "bytes.txt is no UTF-8"),
    "--recipe gptq --data absent.txt": (QUANTIZE, "--data absent.txt does not exist"),
    "--config int8": ("quantize absent out ", "is no folder"),
    "--config int9": ("quantize model out ", "unknown format"),
    " --config int8": ("quantize model /proc/out", "cannot be written"),
    f" --device {ABSENT}": ("bench model", "is not there"),
    " --configs int9": ("bench model", "unknown format"),
    "other": ("bench ", "is no language model"),
    "other --text text.txt": ("eval ", "is no language model"),
    f"--device  {ABSENT}": ("eval model --text text.txt ", "is not there"),
    "--text absent": ("eval model ", "does not exist"),
    "--text  short.txt": ("eval model ", "fewer than two tokens"),
    "--plan /proc/plan.json": ("autoquant model ", "cannot be written"),
    "--plan other": ("autoquant model ", "is a folder"),
    f"--plan p.json --device {ABSENT}": ("autoquant model ", "is not there"),
    "absent": ("inspect ", "there is no file"),
    "org/name out": ("quantize --config int8 ", "hf download org/name"),
    "other out": ("quantize --config int8 ", "it has pytorch_model.bin, which is a pickle"),
    "--skip lm_head mpl": (QUANTIZE, "'mpl' fits no module of the model; near to it are"),
    "--skip [": (QUANTIZE, "is no regular expression"),
    "--text text.txt --window 128": (QUANTIZE, "--window 128 is more than the 64 positions"),
    "--window  65": ("eval model --text text.txt ", "more than the 64 positions"),
    "--tokens 1 65": ("bench model ", "more than the 64 positions"),
    "--recipe gtpq": (QUANTIZE, "--recipe must be among"),
    "--plan broken.json": ("quantize model out ", "broken.json holds no plan"),
    "--plan absent.json": ("quantize model out ", "does not exist"),
}


@pytest.mark.parametrize("words", CASES)
def test_found_before_the_work(words, folder, tmp_path, capsys):
    start, reason = CASES[words]
    before = sorted(tmp_path.rglob("*"))
    assert main((start + words).split()) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        *(f"{QUANTIZE}{each}" for each in ("--window 0", "--window 1", "--window -3", "--samples 0", "--latency 1 0")),
        *(f"{QUANTIZE}--shard-size {each}" for each in ("0", "-1GB", "nan", "inf", "much")),
        *(f"eval model --text text.txt {each}" for each in ("--window 0", "--window -1", "--windows 0")),
        *(f"bench model {each}" for each in ("--tokens 0", "--tokens 1 -1", "--batch 0", "--runs 0", "--threads 0")),
        *(f"autoquant model --plan p.json {each}" for each in ("--tokens 0", "--batch -1", "--threads 0")),
    ],
)
def test_numbers_that_mean_nothing(words, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2 and "error: argument --" in capsys.readouterr().err


def test_what_can_be_made_is_made(folder, tmp_path):
    """An output in a folder that is not there yet is no mistake; the work begins."""
    with pytest.raises(AssertionError, match="work began"):
        main(f"{QUANTIZE}--report new/sub/r.html --text text.txt --window 4".split())
    with pytest.raises(AssertionError, match="work began"):
        main(["autoquant", "model", "--plan", "new/sub/p.json"])
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_found_before_the_work(folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert main(f"{QUANTIZE}".split()) == 2
    assert "OUT_DIR out will take some" in capsys.readouterr().err


def test_mistakes_are_told_without_torch(folder):
    """Nothing that takes a second to import comes along for what needs none of it."""
    code = (
        "import sys; sys.argv[0] = 'ao'; import ao_command\n"
        "try: ao_command.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    for words in (
        "--help", "--version", "formats", "quantize --help", "quantize model out --config int9",
        "quantize absent out --config int8",
        "quantize model out --config int8 --skip mpl", "quantize model out --config int8 --device nonsense",
        "bench model --configs int9", "eval model --text text.txt --window 65", "autoquant model --plan other",
    ):  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-c", code, *words.split()],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert ran.stdout.endswith("[]\n"), (words, ran.stdout[-300:], ran.stderr[-300:])
