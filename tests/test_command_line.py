"""The program `ao`: what it prints, what it returns, and what it does without."""

from __future__ import annotations

import ast
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ao
import ao_command
from ao.integrations.command_line import completion, format_names, inspect_checkpoint
from ao.integrations.command_line.program import main, parser

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32, bias=False)).bfloat16()
    ao.quantize_(model, ao.FqnToConfig({"0": ao.Intx(4, (1, 32), scale_dtype="bfloat16"), "1": ao.NF4}))
    state = {**model.state_dict(), "tied": model[0].bias, "0.bias": model[0].bias, "s": torch.zeros(())}
    ao.save(state, tmp_path / "model.safetensors")
    return tmp_path, state


def test_inspect_tells_what_is_there(checkpoint, capsys):
    folder, state = checkpoint
    assert main(["inspect", str(folder), "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert found.keys() == state.keys()
    for name in ("0.weight", "1.weight"):
        q = state[name]
        assert found[name]["bytes"] == q.nbytes_packed
        assert found[name]["shape"] == list(q.shape) and found[name]["dtype"] == "bfloat16"
    scale = state["0.weight"].scale.float()
    assert found["0.weight"]["scale"] == [scale.min().item(), scale.max().item()]
    assert found["0.weight"]["format"] == repr(state["0.weight"].spec)
    assert found["1.weight"]["scale"] is None  # it is quantized itself
    assert found["0.bias"]["format"] == "bfloat16" and found["0.bias"]["bytes"] == 64
    assert found["tied"]["format"] == "tied to 0.bias" or found["0.bias"]["format"] == "tied to tied"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_ranges_without_numpy(dtype, tmp_path, monkeypatch):
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    spec = ao.Intx(8, (1, 16), scale_dtype=str(kind).removeprefix("torch."))
    q = spec.quantize(torch.randn(5, 48))
    ao.save({"w": q}, tmp_path / "w.safetensors")
    expected = (q.scale.float().min().item(), q.scale.float().max().item())
    for _ in range(2):
        assert inspect_checkpoint.inspect(tmp_path / "w.safetensors")[0].scale == expected
        monkeypatch.setitem(sys.modules, "numpy", None)


def test_inspect_filters_sorts_and_sums(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, _ = checkpoint
    assert main(["inspect", str(folder / "model.safetensors"), "--match", "*.weight", "--sort", "bytes"]) == 0
    table, summary = capsys.readouterr().out.split("\n\n")
    names = [line.split()[0] for line in table.splitlines()[2:]]
    assert names == ["1.weight", "0.weight"]  # by bytes
    total = summary.splitlines()[-1].split()
    assert total[0] == "total" and total[1] == "2" and total[2] == f"{2 * 64 * 32:,}"


def test_tables_fit_the_terminal(checkpoint, tmp_path, capsys, monkeypatch):
    """Long formats become headings above the tensors that have them."""
    monkeypatch.delenv("COLUMNS", raising=False)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32))
    ao.quantize_(model, ao.Int8DynamicActivationInt4WeightConfig(group_size=32))
    ao.save(model, tmp_path / "act.safetensors")
    assert main(["inspect", str(tmp_path / "act.safetensors")]) == 0
    table, summary = capsys.readouterr().out.split("\n\n")
    form = repr(model[0].weight.spec)
    assert max(map(len, (table + "\n" + summary).splitlines())) <= 110 and len(form) > 60
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        form.split()[0], "0.weight", "1.weight", "float32", "0.bias", "1.bias"
    ]  # fmt: skip
    assert summary.splitlines()[2] == form and summary.splitlines()[3].split()[0] == "2"
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(tmp_path / "act.safetensors"), "--summary"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-4] == "2"  # in the line of its format
    assert main(["formats"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_names_that_a_terminal_cannot_show(tmp_path, monkeypatch):
    ao.save({"größe": torch.zeros(2)}, tmp_path / "x.safetensors")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert rb"gr\xf6\xdfe" in shown.getvalue()


def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def fail(error):
        def run(args):
            raise error

        monkeypatch.setattr(format_names, "run", run)

    fail(KeyError("scale"))
    assert main(["formats"]) == 1
    assert "ao formats: KeyError: 'scale' (with AO_TRACEBACK=1" in capsys.readouterr().err
    fail(OSError(28, "No space left on device"))
    assert main(["formats"]) == 1
    assert capsys.readouterr().err == "ao formats: the output: No space left on device\n"
    fail(ValueError("no such model\nhere\n\nUpdate the library"))
    assert main(["formats"]) == 1
    assert capsys.readouterr().err == "ao formats: no such model here\n"
    fail(ModuleNotFoundError("No module named 'transformers.utils'", name="transformers.utils"))
    assert main(["formats"]) == 1
    assert 'transformers is needed here, and not installed: pip install "ao-lowbit[hf]"' in capsys.readouterr().err
    fail(OSError(28, "No space left on device", "r.html"))
    assert main(["formats"]) == 1
    assert capsys.readouterr().err == "ao formats: r.html: No space left on device\n"
    fail(KeyError("scale"))
    monkeypatch.setenv("AO_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["formats"])


def test_an_interrupt_that_an_import_swallows(monkeypatch, capsys):
    def run(args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(format_names, "run", run)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside itself ignores it
    try:
        assert main(["formats"]) == 130 and capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_an_early_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(ao_command, "_program", interrupted)
    assert ao_command.main() == 130
    assert capsys.readouterr().err == "interrupted\n"
    body = ast.parse(Path(ao_command.__file__).read_text(encoding="utf-8")).body
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)  # before anything waits for Ctrl-C


def test_failures_have_reasons_and_codes(tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    cut = tmp_path / "cut.safetensors"
    ao.save({"w": torch.zeros(100)}, cut)
    cut.write_bytes(cut.read_bytes()[:-1])
    for path, reason in (
        (broken, "is no safetensors file"),
        (cut, "is cut short"),
    ):
        assert main(["inspect", str(path)]) == 1
        assert reason in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 2 and "there is no file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--match", "x"]) == 1
    with pytest.raises(SystemExit) as stop:
        main(["inspect"])
    assert stop.value.code == 2


def test_the_named_formats_cost_what_they_say():
    weight = torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16)
    for name, form in format_names.FORMATS.items():
        config = format_names.config_of(name)
        spec = config if isinstance(config, ao.Spec) else config.weight(tuple(weight.shape))
        assert 8 * spec.quantize(weight).nbytes_packed / weight.numel() == pytest.approx(form.bits, abs=0.006), name


@pytest.mark.parametrize(
    "wrong",
    ["int5-g7", "__import__('os').system('true')", "Intx.registry", "quantize_", "Intx(bits=9)", "torch.int4", "("],
)
def test_an_expression_is_a_config_or_refused(wrong):
    with pytest.raises(ValueError, match="format"):
        format_names.config_of(wrong)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands(shell):
    text = completion.script(shell, parser())
    assert all(word in text for word in ("inspect", "formats", "match" if shell == "fish" else "--match"))


def test_bash_completes():
    text = completion.script("bash", parser())
    ask = 'COMP_WORDS=(ao inspect --so); COMP_CWORD=2; _ao; echo "${COMPREPLY[@]}"'
    shell = subprocess.run(["bash", "-c", f"{text}\n{ask}"], capture_output=True, text=True, check=True)
    assert shell.stdout.strip() == "--sort"


def test_the_program_inspects_without_torch(checkpoint):
    folder, _ = checkpoint
    code = "import sys, ao_command; code = ao_command.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    run = subprocess.run([sys.executable, "-c", code, "inspect", str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and "0.weight" in run.stdout, run.stderr


def test_python_m_ao():
    run = subprocess.run([sys.executable, "-m", "ao", "formats", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert json.loads(run.stdout).keys() == format_names.FORMATS.keys()
    assert run.stderr == ""
