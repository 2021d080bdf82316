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


class WorkBegan(BaseException):
    """Which `main` lets through."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder that nobody gets to load."""

    def work(*args, **kwargs):
        raise WorkBegan

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
    (tmp_path / "numbers.json").write_text('{"a.b": 3}')
    (tmp_path / "none.json").write_text('{"a.b": null}')
    (tmp_path / "group.json").write_text('{"a.b": {"type": "Int8WeightOnlyConfig", "group": 3}}')
    for name, told in (
        ("masked", {"architectures": ["BertForMaskedLM"]}),
        ("seq2seq", {"is_encoder_decoder": True}),
        ("ours", {"quantization_config": {"quant_method": "ao"}}),
        ("done", {"quantization_config": {"quant_method": "gptq"}}),
        ("cut", {}),
        ("wordless", {}),
    ):
        shutil.copytree(made, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 8, **told}))
    (tmp_path / "cut" / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:-2])
    (tmp_path / "wordless" / "tokenizer.json").write_text("{}")
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
    "--skip modle.layers.0": (QUANTIZE, "'modle.layers.0' fits no module of the model; near to it are model.layers.0"),
    "--skip [": (QUANTIZE, "is no regular expression"),
    "--text text.txt --window 128": (QUANTIZE, "--window 128 is more than the 64 positions"),
    "--window  65": ("eval model --text text.txt ", "more than the 64 positions"),
    "--tokens 1 65": ("bench model ", "more than the 64 positions"),
    "--recipe gtpq": (QUANTIZE, "--recipe must be among"),
    "--plan broken.json": ("quantize model out ", "broken.json holds no plan"),
    "--plan absent.json": ("quantize model out ", "does not exist"),
    "--plan numbers.json": ("quantize model out ", "a.b: 3 is no config"),
    "--plan none.json": ("quantize model out ", "leaves every layer as it is"),
    "--plan group.json": (
        "quantize model out ",
        "Int8WeightOnlyConfig has no parameter 'group'; near to it is group_size",
    ),
    "--config  bf16": ("quantize model out ", "quantizes nothing"),
    "--config Int8WeightOnlyConfig(group=3)": (
        "quantize model out ",
        "has no parameter 'group'; near to it is group_size",
    ),
    "--config Int8WeightOnlyConfg()": ("quantize model out ", "near to it: Int8WeightOnlyConfig"),
    "--config Intx(bits=9)": ("quantize model out ", "Intx: bits must be 1 to 8, got 9"),
    "--config Intx(bits=3": ("quantize model out ", "was never closed"),
    "--config Intx(3,(1,64),zero_point='no')": ("quantize model out ", "zero_point must be one of int, float"),
    "--config Int4WeightOnlyConfig(group_size=0)": ("quantize model out ", "group_size must be a number such as 128"),
    "--config FPXWeightOnlyConfig()": ("quantize model out ", "FPXWeightOnlyConfig needs ebits and mbits"),
    "--config FqnToConfig({'a':Intx(bit=3)})": (
        "quantize model out ",
        "Intx has no parameter 'bit'; near to it is bits",
    ),
    "--config IntxWeightOnlyConfig(torch.int9)": ("quantize model out ", "torch.int9 is no dtype"),
    "--recipe gptq": (QUANTIZE, "needs texts to calibrate on"),
    "--recipe gptq+awq": (QUANTIZE, "'gptq' decides the codes, and must come last"),
    "--data text.txt": (QUANTIZE, "nothing here does"),
    "--config int4+gptq": ("quantize model out ", "needs texts to calibrate on"),
    "--config int8_static_activation_int8_weight": ("quantize model out ", "needs texts to calibrate on"),
    "--config Int4WeightOnlyConfig(algorithm=GPTQ())": ("quantize model out ", "needs texts to calibrate on"),
    "--configs Intx(bitz=3)": ("eval model --text text.txt ", "Intx has no parameter 'bitz'"),
    "model new": ("convert ", "is not quantized; use `ao quantize`"),
    "model  new": ("export ", "is no folder that ao has quantized"),
    "--config  int8": ("quantize done new ", "is quantized already"),
    "model model/new": ("quantize --config int8 ", "OUT_DIR model/new lies in model, which is only read"),
    "--window 8": (QUANTIZE, "--window 8 cuts the texts of --data and --text, and neither is given"),
    "--samples 8": (QUANTIZE, "--samples 8 is for --data, which is not given"),
    "--device hpu": (QUANTIZE, "--device hpu is not there"),
    "https://huggingface.co/org/name out": ("quantize --config int8 ", "hf download org/name"),
    "--config  int9": (QUANTIZE.replace("int8", "int9"), "--config: unknown format"),
    "--configs bf16 int9": ("eval model --text text.txt ", "--configs: unknown format 'int9'"),
    "--configs int8+gptq": ("bench model ", "--configs 'int8+gptq' needs texts to calibrate on"),
    "masked --text text.txt": ("eval ", "holds a BertForMaskedLM, which does not tell the next token"),
    "masked  new --text text.txt": ("quantize --config int8 ", "--text measures perplexity"),
    "seq2seq": ("bench ", "is an encoder and a decoder"),
    "seq2seq new --recipe gptq --data text.txt": (
        "quantize --config int8 ",
        "--data: seq2seq is an encoder and a decoder",
    ),
    "done --text text.txt --configs int8": ("eval ", "--configs: done is quantized already"),
    "done --configs int8": ("bench ", "--configs: done is quantized already"),
    "done --plan p.json": ("autoquant ", "done is quantized already"),
    "ours new": ("convert ", "ours is a folder of ao's already"),
    "cut --text text.txt": ("eval ", "model.safetensors is cut short"),
    "wordless --text text.txt": ("eval ", "tokenizer.json holds no tokenizer"),
    "other ": ("inspect ", "it has pytorch_model.bin, which is a pickle"),
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
    with pytest.raises(WorkBegan):
        main(f"{QUANTIZE}--report new/sub/r.html --text text.txt --window 4".split())
    with pytest.raises(WorkBegan):
        main(["autoquant", "model", "--plan", "new/sub/p.json"])
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_found_before_the_work(folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert main(f"{QUANTIZE}".split()) == 2
    assert "OUT_DIR out will take some" in capsys.readouterr().err


ANSWERS = ["--help", "--version", "formats", "quantize --help", "completion bash", "inspect model"]


def test_mistakes_are_told_without_torch(folder):
    """Nothing that takes a second to import comes along for what needs none of it."""
    code = (
        "import sys, ao_command\n"
        "for line in sys.stdin:\n"
        "    sys.argv = ['ao', *line.split()]\n"
        "    try: ao_command.main()\n"
        "    except SystemExit: pass\n"
        "    print(f'\\n{line.strip()} imports', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    lines = [*ANSWERS, *(start + words for words, (start, _) in CASES.items() if "cuda" not in words)]
    ran = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    said = [line for line in ran.stdout.splitlines() if " imports [" in line]
    assert ran.returncode == 0 and len(said) == len(lines), ran.stderr
    assert [line for line in said if not line.endswith(" imports []")] == []
