"""Saving and loading: exact round trips, the file format, ties, shards, crashes, and what a damaged file is told."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from cases import CASES, weight
from torch import Tensor, nn

from ao.dtypes import NF4, Codebook, Float8, Intx, QTensor
from ao.dtypes.checkpoint import INDEX, SINGLE, flatten, load, save

every = pytest.mark.parametrize("case", CASES, ids=str)
INT4 = Intx(4, (1, 32))


def same(a: Tensor, b: Tensor) -> bool:
    """The same kind of tensor with the same bits."""
    if isinstance(a, QTensor):
        return type(a) is type(b) and torch.equal(a, b) and torch.equal(a.dequantize(), b.dequantize())
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same(a[name], b[name]), name


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# What is saved comes back.


@every
@pytest.mark.parametrize("where", ["model.safetensors", "folder"])
def test_every_dtype(case, where, tmp_path):
    state = {"w": case.spec.quantize(weight((64, 256), dtype=torch.bfloat16)), "b": torch.randn(64)}
    save(state, tmp_path / where)
    back = load(tmp_path / where)
    assert_same(state, back)
    assert back["w"].spec == case.spec and back["w"].dtype == torch.bfloat16 and not back["w"].requires_grad


VIEWS = {
    "transposed": lambda q: q.t(),
    "rows": lambda q: q[8:40],
    "columns": lambda q: q[:, 64:128],
    "part of a block": lambda q: q[:, 32:64],
    "no rows": lambda q: q[:0],
    "every other row": lambda q: q[::2],
    "batched": lambda q: q.unsqueeze(0).expand(3, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("spec", [Intx(4, (1, 64)), Intx(8), Float8(), NF4], ids=str)
def test_views_of_a_larger_qtensor(spec, view, tmp_path):
    w = VIEWS[view](spec.quantize(weight((64, 256))))
    save({"w": w}, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")["w"]
    assert back.shape == w.shape and torch.equal(back.dequantize(), w.dequantize())
    assert sum(f.numel() for f in back.fields().values()) <= sum(f.numel() for f in w.fields().values())
    if view == "part of a block":
        assert not w.whole and back.whole  # it owns its block now
        back.mul_(2)


def test_static_and_pre_scales(tmp_path):
    spec = Intx(8, act=Intx(8, (-1, -1)))
    w = spec.quantize(weight((64, 256)), pre_scale=torch.rand(1, 256) + 0.5, act_scale=torch.tensor(0.1))
    save({"w": w}, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")["w"]
    assert same(w, back) and back.act_scale.shape == () and torch.equal(back.pre_scale, w.pre_scale)


DTYPES = "float64 float32 bfloat16 float16 float8_e4m3fn float8_e5m2 float8_e8m0fnu complex64 bool"
DTYPES += " int64 int32 int16 int8 uint8 uint16 uint32 uint64"


def test_plain_tensors(tmp_path):
    state = {d: (torch.arange(64, dtype=torch.uint8) % 2).view(getattr(torch, d)) for d in DTYPES.split()}
    base = torch.randn(8, 6)
    state |= {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0, dtype=torch.int8),
        "transposed": base.t(),
        "column": base[:, 1],
        "narrow": base[2:5],
        "empty view": base[3:3],
        "overlaps narrow": base[3:6],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "neg": torch.randn(3, dtype=torch.complex64).conj().imag,
        "odd \u00e9 \"name'": torch.ones(3, dtype=torch.int8),
        "": torch.ones(1),
    }
    save(state, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    assert list(back) == list(state)
    assert_same({k: t.resolve_conj().resolve_neg() for k, t in state.items()}, back)
    assert all(t.is_contiguous() for t in back.values())
    save({}, tmp_path / "none")
    assert load(tmp_path / "none") == {}


def test_grad_and_autograd_history_are_left_out(tmp_path):
    w = nn.Parameter(torch.randn(3, 3))
    save({"w": w, "v": w * 2}, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    assert not back["w"].requires_grad and not back["v"].requires_grad and torch.equal(back["v"], w.detach() * 2)


def test_files_from_before_scales_held_zero_points():
    """What presets wrote then: float32 scales with zero points of a byte, and bfloat16 for both."""
    stored = load(Path(__file__).parent / "stored_before_joint.safetensors")
    for name, bits, kind in (("int4", 4, "int"), ("uint2_clip", 2, "int"), ("uint3_hqq", 3, "float")):
        q = stored[name]
        assert q.spec == Intx(
            bits, (1, 32), signed=False, symmetric=False, zero_point=kind, scale_dtype=q.spec.scale_dtype
        )
        assert torch.equal(q.dequantize(), stored[f"{name}.expected"]) and q.zero_point.shape == q.scale.shape == (
            16,
            2,
        )


def test_the_format(tmp_path):
    q = NF4.quantize(weight((2, 128), dtype=torch.bfloat16))
    tied = nn.Parameter(torch.ones(2))
    save({"w": q, "b": tied, "c": tied}, tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "ao"} and metadata["format"] == "pt"
    affine = {
        "type": "Intx",
        "act": None,
        "bits": 8,
        "block": [1, -1],
        "signed": False,
        "symmetric": False,
        "clip": True,
        "zero_point": "float",
        "narrow": False,
        "scale_dtype": "float32",
        "rounding": "nearest",
    }
    assert json.loads(metadata["ao"]) == {
        "version": 1,
        "tensors": {
            "w": {
                "spec": {
                    "type": "Codebook",
                    "act": None,
                    "table": "nf4",
                    "block": [1, 64],
                    "scale_spec": affine,
                    "offset": False,
                    "scale_dtype": "float32",
                },
                "dtype": "bfloat16",
                "shape": [2, 128],
                "fields": {
                    "qdata": None,
                    "scale": {
                        "spec": affine,
                        "dtype": "float32",
                        "shape": [2, 2],
                        "fields": {"qdata": None, "scale": None, "zero_point": None},
                    },
                    "table": None,
                },
            },
            "b": None,
            "c": {"same_as": "b", "parameter": True},
        },
    }
    stored = safetensors.torch.load_file(tmp_path / "m.safetensors")  # any other reader
    assert sorted(stored) == ["b", "w", "w.qdata", "w.scale.qdata", "w.scale.scale", "w.scale.zero_point", "w.table"]
    assert torch.equal(stored["w.scale.qdata"], q.scale.qdata)
    assert stored["w"].shape == (0,)  # the guard


def test_files_without_guards_are_read(tmp_path):
    state = {"w": INT4.quantize(weight((8, 64))), "b": torch.ones(2)}
    save(state, tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", lambda about, tensors: (tensors.pop("w"), about)[1])
    assert_same(state, load(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("cuts", [1, 3, 9])
def test_shards_cut_anywhere_with_one_header(cuts, tmp_path):
    tied = nn.Parameter(INT4.quantize(weight((8, 64))), requires_grad=False)
    state = {"a": tied, "b": torch.ones(2), "c": NF4.quantize(weight((8, 128))), "d": tied}
    tensors, metadata = flatten(state)
    names = list(tensors)
    weight_map = {name: f"model-0000{i * cuts // len(names)}-of-1.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(part, tmp_path / file, metadata)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    back = load(tmp_path)
    assert_same(state, back)
    assert back["a"] is back["d"]
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {names[0]: weight_map[names[0]]}}))
    with pytest.raises(ValueError, match="differ in|it lacks"):
        load(tmp_path)


# Ties.


class Tied(nn.Module):
    """An embedding whose weight is also that of the head, and a table shared as a buffer."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(32, 64), nn.Linear(64, 32), nn.LayerNorm(64)
        if quantized:
            self.embed.weight = nn.Parameter(INT4.quantize(self.embed.weight))
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.ones(3))
        self.norm.register_buffer("table", self.table)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_stay_tied_in_a_model(quantized, meta, tmp_path):
    model = Tied(quantized)
    model.head.bias.requires_grad_(False)
    save(model, tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m" / SINGLE)
    assert not any(name.startswith("head.weight") for name in stored) and "norm.table" not in stored

    sd = load(tmp_path / "m")
    assert sd["embed.weight"] is sd["head.weight"] and sd["table"] is sd["norm.table"]
    with torch.device("meta" if meta else "cpu"):
        other = Tied(quantized=False)
    other.head.bias.requires_grad_(False)
    other.load_state_dict(sd, assign=True)
    assert other.head.weight is other.embed.weight and isinstance(other.embed.weight, nn.Parameter)
    assert other.embed.weight.requires_grad and other.norm.weight.requires_grad and not other.head.bias.requires_grad
    assert isinstance(other.embed.weight, QTensor) == quantized
    assert dict(other.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert len(list(other.parameters())) == len(list(model.parameters()))
    ids = torch.arange(32)
    assert torch.equal(other(ids), model(ids))
    other(ids).sum().backward()
    assert_same({k: v.detach() for k, v in model.state_dict().items()}, load(tmp_path / "m"))


def test_ties_in_a_state_dict(tmp_path):
    q, t = INT4.quantize(weight((8, 64))), torch.randn(4, 4)
    state = {"a": q, "b": q.detach(), "c": q.clone(), "t": t, "u": t.detach(), "v": t.view(16), "w": t.t(), "x": t}
    save(state, tmp_path / "m", max_shard_size=1)
    back = load(tmp_path / "m")
    assert_same(state, back)
    assert back["a"] is back["b"] and back["a"] is not back["c"]
    assert back["t"] is back["u"] is back["x"] and type(back["t"]) is Tensor
    assert len({t.data_ptr() for t in (back["t"], back["v"], back["w"])}) == 3


def test_a_parameter_tied_under_three_names(tmp_path):
    p = nn.Parameter(torch.randn(4))
    save({"a": p, "b": p, "c": p}, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    assert back["a"] is back["b"] is back["c"] and isinstance(back["a"], nn.Parameter)
    save({"a": p, "b": p.detach()}, tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    assert back["a"] is back["b"] and not isinstance(back["a"], nn.Parameter)


def test_a_field_shared_by_two_tensors(tmp_path):
    scale = torch.rand(1, 64) + 0.5
    state = {name: INT4.quantize(weight((8, 64), seed), pre_scale=scale) for seed, name in enumerate("qkv")}
    save(state, tmp_path / "m.safetensors")
    assert_same(state, load(tmp_path / "m.safetensors"))


# Models, devices, memory maps.


def quantized_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 64, bias=False))
    for i, spec in ((0, INT4), (3, Float8(act=Float8()))):
        model[i].weight = nn.Parameter(spec.quantize(model[i].weight), requires_grad=False)
    return model.eval()


@pytest.mark.parametrize("limit", ["5GB", 1])
def test_into_a_model_on_meta(limit, tmp_path):
    model = quantized_model()
    save(model, tmp_path / "m", max_shard_size=limit)
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 64, bias=False)).eval()
        sd = load(tmp_path / "m")  # whatever the default device
    other.load_state_dict(sd, assign=True)
    x = torch.randn(5, 64)
    assert torch.equal(other(x), model(x)) and other[0].weight.requires_grad


def test_a_model_inherits_the_shape_check_of_load_state_dict(tmp_path):
    save(quantized_model(), tmp_path / "m")
    other = nn.Sequential(nn.Linear(64, 16))
    before = other[0].weight
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight"):
        other.load_state_dict(load(tmp_path / "m"), assign=True)
    assert other[0].weight is before


def test_devices(device, tmp_path):
    state = {k: v.to(device) for k, v in quantized_model().state_dict().items()}
    save(state, tmp_path / "m")
    back = load(tmp_path / "m")
    assert all(t.device.type == "cpu" for t in back.values())
    assert_same({k: v.cpu() for k, v in state.items()}, back)
    again = load(tmp_path / "m", device=device)
    assert all(t.device.type == device for t in again.values())
    assert_same(state, again)
    shapes = load(tmp_path / "m", device="meta")
    assert {k: (t.shape, t.dtype) for k, t in shapes.items()} == {k: (t.shape, t.dtype) for k, t in state.items()}


@pytest.mark.parametrize("mmap", [True, False])
def test_writing_to_what_was_loaded_leaves_the_file_alone(mmap, tmp_path):
    path = tmp_path / "m.safetensors"
    save({"t": torch.zeros(2000), "q": INT4.quantize(weight((8, 64)))}, path)
    first = path.read_bytes()
    back = load(path, mmap=mmap)
    back["t"].add_(1)
    back["q"].mul_(2)
    assert path.read_bytes() == first
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert (str(path) in maps.read_text()) == mmap


@pytest.mark.parametrize("limit", ["5GB", 1])
def test_saving_over_the_files_that_are_mapped(limit, tmp_path):
    state = {f"t{i}": torch.full((5000,), float(i)) for i in range(3)}
    save(state, tmp_path / "m", max_shard_size=limit)
    for _ in range(3):
        save(load(tmp_path / "m"), tmp_path / "m", max_shard_size=limit)
    back = load(tmp_path / "m")
    save({"other": torch.zeros(1)}, tmp_path / "m")
    assert_same(state, back)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "m", max_shard_size=4)
    finally:
        os.umask(old)
    assert {(tmp_path / "m" / f).stat().st_mode & 0o777 for f in files(tmp_path / "m")} == {0o640}


# Shards.


def test_shards(tmp_path):
    state = {f"layers.{i}.weight": INT4.quantize(weight((32, 64), i)) for i in range(5)} | {"norm": torch.ones(64)}
    each = state["layers.0.weight"].nbytes_packed
    save(state, tmp_path / "m", max_shard_size=2 * each)
    assert files(tmp_path / "m") == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * each + 256}
    for i in range(5):
        fields = {f"layers.{i}.weight.{f}" for f in ("qdata", "scale", "zero_point")}
        assert {index["weight_map"][f] for f in fields} == {f"model-0000{i // 2 + 1}-of-00003.safetensors"}
    for shard in set(index["weight_map"].values()):
        stored = safetensors.torch.load_file(tmp_path / "m" / shard)
        assert stored.keys() == {name for name, file in index["weight_map"].items() if file == shard}
        assert sum(t.nbytes for t in stored.values()) <= 2 * each + 256
    assert_same(state, load(tmp_path / "m"))
    part = load(tmp_path / "m" / "model-00002-of-00003.safetensors")
    assert_same({k: state[k] for k in ("layers.2.weight", "layers.3.weight")}, part)


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path):
    state = {"a": torch.ones(1), "big": torch.ones(100), "b": torch.ones(1), "c": torch.ones(1), "z": torch.empty(0)}
    save(state, tmp_path / "m", max_shard_size=8)
    weight_map = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert [int(weight_map[k][6:11]) for k in state] == [1, 2, 3, 3, 3]
    assert_same(state, load(tmp_path / "m"))


@pytest.mark.parametrize(
    "size, single",
    [(4096, True), ("4096B", True), ("4 KiB", True), ("4.096KB", True), ("5GB", True), ("4KB", False), (4095, False)],
)
def test_sizes(size, single, tmp_path):
    save({"a": torch.ones(512), "b": torch.ones(512)}, tmp_path / "m", max_shard_size=size)
    assert (tmp_path / "m" / SINGLE).exists() == single


@pytest.mark.parametrize("size", ["5", "GB", "5 gigabytes", "1.2.3GB", 0, -1, 1e9, None])
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size is in bytes, or like '5GB' or '512MiB', got"):
        save({"a": torch.ones(1)}, tmp_path / "m", max_shard_size=size)
    assert files(tmp_path) == []


def test_transformers_finds_the_shards(tmp_path):
    hub = pytest.importorskip("transformers.utils.hub")
    state = {"a": torch.ones(2), "b": torch.ones(2)}
    for _ in range(2):  # the second time under other names
        save(state, tmp_path / "m", max_shard_size=8)
        found, about = hub.get_checkpoint_shard_files(str(tmp_path / "m"), str(tmp_path / "m" / INDEX))
        assert len(found) == 2 and all(Path(f).exists() for f in found)
        assert about["all_checkpoint_keys"] == ["a", "b"]


# Replacing a checkpoint, with and without a crash.

BEFORE = {f"t{i}": torch.full((4,), float(i)) for i in range(3)}
AFTER = {f"t{i}": torch.full((4,), 10.0 + i) for i in range(3)}
LIMITS = {"one file": "5GB", "2 shards": 32, "3 shards": 16}
pairs = pytest.mark.parametrize("before, after", list(itertools.product(LIMITS, LIMITS)), ids=str)


def clean(folder: Path) -> bool:
    """Whether the folder holds the files of its checkpoint and nothing besides."""
    if (folder / SINGLE).exists():
        return files(folder) == [SINGLE]
    return files(folder) == sorted({INDEX, *json.loads((folder / INDEX).read_text())["weight_map"].values()})


@pairs
def test_replacing(before, after, tmp_path):
    save(BEFORE, tmp_path / "m", max_shard_size=LIMITS[before])
    save(AFTER, tmp_path / "m", max_shard_size=LIMITS[after])
    assert_same(AFTER, load(tmp_path / "m"))
    assert clean(tmp_path / "m")


def test_replacing_leaves_other_files(tmp_path):
    (tmp_path / "m").mkdir()
    others = [
        "config.json",
        "adapter_model.safetensors",
        "model.safetensors.bak",
        ".model.safetensors.tmp",
        "model-1.bin",
    ]
    for name in others:
        (tmp_path / "m" / name).write_text("x")
    save(BEFORE, tmp_path / "m", max_shard_size=16)
    save(AFTER, tmp_path / "m")
    assert files(tmp_path / "m") == sorted([*others, SINGLE])


def crash_at(step: int, folder: Path, run) -> bool:
    """Run in a forked process that gets SIGKILL at its `step`-th change to `folder`. Whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork, in a process with threads
        child = os.fork()
    if child == 0:
        try:
            count = itertools.count(1)

            def hook(event: str, args: tuple) -> None:
                changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
                if (changes or event == "open") and str(folder) in str(args[0]) and next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            whole = safetensors.torch.save_file

            def in_two_steps(tensors, file, metadata):
                whole(tensors, file, metadata)
                data = Path(file).read_bytes()
                Path(file).write_bytes(data[: len(data) // 2])
                Path(file).write_bytes(data)

            safetensors.torch.save_file = in_two_steps
            sys.addaudithook(hook)
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before, after",
    [("one file", "one file"), ("one file", "2 shards"), ("2 shards", "one file"), ("2 shards", "2 shards")],
)
def test_killed_at_any_moment(before, after, tmp_path):
    start, folder, turned = tmp_path / "start", tmp_path / "m", []
    save(BEFORE, start, max_shard_size=LIMITS[before])
    for step in itertools.count(1):
        shutil.copytree(start, folder)
        killed = crash_at(step, folder, lambda: save(AFTER, folder, max_shard_size=LIMITS[after]))
        back = load(folder)
        turned.append(back["t0"][0].item() == 10)
        assert_same(AFTER if turned[-1] else BEFORE, back)
        if step % 3 == 0:  # the next one succeeds, in either form, and cleans up
            save(AFTER, folder, max_shard_size=LIMITS[before if step % 2 else after])
            assert_same(AFTER, load(folder))
            assert clean(folder)
        shutil.rmtree(folder)
        if not killed:
            break
    assert turned == sorted(turned) and turned[-1] and not turned[0] and step > 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_single_file_killed_at_any_moment(tmp_path):
    folder, path = tmp_path / "m", tmp_path / "m" / "x.safetensors"
    for step in itertools.count(1):
        save(BEFORE, path)
        (folder / "other.safetensors").write_text("not ours")
        killed = crash_at(step, folder, lambda: save(AFTER, path))
        back = load(path)
        assert_same(AFTER if back["t0"][0] == 10 else BEFORE, back)
        if not killed:
            break
    assert back["t0"][0] == 10 and step > 5
    assert files(folder) == ["other.safetensors", "x.safetensors"]  # what the killed ones left is gone


@pairs
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_no_trace(before, after, error, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    save(BEFORE, folder, max_shard_size=LIMITS[before])
    listing, replace = files(folder), os.replace
    for fails in range(1, {"one file": 1, "2 shards": 3, "3 shards": 4}[after] + 1):
        count = itertools.count(1)

        def failing(source, target, fails=fails, count=count):
            if next(count) == fails:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(type(error)):
            save(AFTER, folder, max_shard_size=LIMITS[after])
        assert files(folder) == listing
        assert_same(BEFORE, load(folder))


def test_a_full_disk_is_an_os_error_with_the_name(tmp_path):
    """safetensors' own error is no OSError, and `except OSError` is what people write."""
    pytest.importorskip("resource", reason="limits of a process are POSIX")
    code = """
import resource, sys, torch, ao
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ao.save({"t": torch.zeros(1000)}, sys.argv[1])
except OSError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors")], capture_output=True, text=True)
    assert ran.stdout.startswith(f"{tmp_path / 'm.safetensors'} cannot be written: File too large"), ran.stderr
    assert files(tmp_path) == []


def test_an_interrupt_after_the_index_keeps_what_it_lists(tmp_path, monkeypatch):
    save(BEFORE, tmp_path / "m", max_shard_size=16)
    replace = os.replace

    def late(source, target):
        replace(source, target)
        if Path(target).name == INDEX:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        save(AFTER, tmp_path / "m", max_shard_size=16)
    assert_same(AFTER, load(tmp_path / "m"))


# Refusals. Each says what was asked, what was found, what to do, and where.


def refusal(call, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "m"
    q = INT4.quantize(weight((8, 64)))
    assert refusal(lambda: save({"a._extra_state": {"x": 1}}, path), TypeError) == (
        "ao.save stores tensors, and 'a._extra_state' is of type dict; leave it out"
    )
    assert "'a' is a Tensor of layout torch.sparse_coo; convert it first" in refusal(
        lambda: save({"a": torch.eye(2).to_sparse()}, path), TypeError
    )
    assert "'a' is on the meta device and has no values" in refusal(
        lambda: save({"a": torch.ones(2, device="meta")}, path)
    )
    assert "'a.qdata' is on the meta device" in refusal(lambda: save({"a": q.to("meta")}, path))
    assert refusal(lambda: save({"a": torch.ones(1, dtype=torch.complex128)}, path), TypeError) == (
        "ao.save: safetensors has no torch.complex128, the dtype of ['a']; convert it first"
    )
    assert refusal(lambda: save({"a": q, "a.scale": torch.ones(1)}, path)) == (
        "ao.save: 'a' is stored as 'a.scale', the name of 'a.scale'; rename one of them"
    )
    assert "'a' is stored as 'a.scale'" in refusal(lambda: save({"a.scale": torch.ones(1), "a": q}, path))
    nested = NF4.quantize(weight((8, 64)))
    assert "'a.scale.qdata'" in refusal(lambda: save({"a": nested, "a.scale": q}, path))
    tie = torch.ones(1)
    assert "'a.scale'" in refusal(lambda: save({"a": q, "tie": tie, "a.scale": tie}, path))
    assert "the header of a safetensors file" in refusal(lambda: save({"__metadata__": torch.ones(1)}, path))
    assert not path.exists() or files(path) == []


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    expected = "saving and loading checkpoints needs safetensors: pip install 'ao-lowbit[hf]'"
    assert refusal(lambda: save({}, tmp_path / "m"), ImportError) == expected
    (tmp_path / "m.safetensors").write_bytes(b"")
    assert refusal(lambda: load(tmp_path / "m.safetensors"), ImportError) == expected


def test_paths_that_are_not_there(tmp_path):
    none = tmp_path / "none"
    assert refusal(lambda: load(none), FileNotFoundError) == (
        f"ao.load: there is no {none}; give a path that ao.save wrote"
    )
    assert refusal(lambda: load(tmp_path), FileNotFoundError) == (
        f"ao.load: {tmp_path} holds neither model.safetensors nor model.safetensors.index.json; "
        "give a path that ao.save wrote"
    )
    save(BEFORE, tmp_path, max_shard_size=16)
    gone = tmp_path / "model-00002-of-00003.safetensors"
    gone.unlink()
    assert refusal(lambda: load(tmp_path), FileNotFoundError) == f"ao.load: there is no {gone}; copy it too"
    assert refusal(lambda: load("/dev/null"), OSError).startswith("ao.load: /dev/null is no ordinary file; give")
    assert refusal(lambda: save(BEFORE, 5), TypeError) == "ao.save: path must be a str or a Path, got 5"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        save(BEFORE, tmp_path / "file" / "x.safetensors")
    assert str(tmp_path / "file") in str(error.value) and ".tmp" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 4, 20, -1, -100])
def test_truncated(cut, tmp_path):
    path = tmp_path / "m.safetensors"
    save({"w": INT4.quantize(weight((32, 64)))}, path)
    path.write_bytes(path.read_bytes()[:cut])
    message = refusal(lambda: load(path))
    assert message.startswith(f"ao.load: {path} is no safetensors file, or is cut short (")
    assert message.endswith("; copy or save it again")


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "m.safetensors"
    torch.save({"w": torch.ones(3)}, path)
    assert refusal(lambda: load(path)).startswith(f"ao.load: {path} is no safetensors file, or is cut short (")


def test_foreign(tmp_path):
    path = tmp_path / "m.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata)
        assert refusal(lambda: load(path)) == (
            f"ao.load: {path}: not written by ao.save (its header has no 'ao'); "
            "read it with safetensors.torch.load_file"
        )


def rewritten(path: Path, change) -> None:
    """Change the entries of a file's header, and the tensors it holds, without the care that `save` takes."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["ao"])
    text = change(about, tensors)
    text = text if isinstance(text, str) else json.dumps(about)
    safetensors.torch.save_file({k: t.clone() for k, t in tensors.items()}, path, {"format": "pt", "ao": text})


def entry(about: dict) -> dict:
    return about["tensors"]["w"]


DAMAGE = {
    "newer version": (
        lambda a, t: a.update(version=2),
        "its format is version 2, this ao reads up to 1; upgrade ao",
    ),
    "unknown spec": (
        lambda a, t: entry(a)["spec"].update(type="Int99"),
        "unknown Spec type 'Int99'; this version of ao knows [",
    ),
    "unknown setting": (
        lambda a, t: entry(a)["spec"].update(wings=2),
        "Intx has no field ['wings']; a newer version of ao may have written this",
    ),
    "bad setting": (lambda a, t: entry(a)["spec"].update(bits=9), "Intx: bits must be 1 to 8, got 9"),
    "unknown dtype": (
        lambda a, t: entry(a).update(dtype="float5"),
        "'w' has the dtype 'float5', no floating-point dtype of torch; save it again",
    ),
    "not a dtype": (lambda a, t: entry(a).update(dtype="nn"), "'w' has the dtype 'nn', no floating-point dtype"),
    "integer dtype": (lambda a, t: entry(a).update(dtype="int8"), "'w' has the dtype 'int8', no floating-point dtype"),
    "unknown field": (
        lambda a, t: (entry(a)["fields"].update(wings=None), t.update({"w.wings": torch.ones(1)})),
        "'w': a IntxTensor has no field ['wings']; upgrade ao",
    ),
    "tensor gone": (
        lambda a, t: t.pop("w.scale"),
        "it lacks 'w.scale', which its header describes; save it again",
    ),
    "entry gone": (
        lambda a, t: a["tensors"].pop("b"),
        "it holds ['b'], which its header does not describe; save it again",
    ),
    "field gone": (
        lambda a, t: (t.pop("w.scale"), entry(a)["fields"].pop("scale")),
        "'w' of shape (8, 64), Intx(bits=4, block=(1, 32)), has fields that do not fit: qdata (8, 32) uint8, "
        "zero_point (8, 2) int8; save it again",
    ),
    "another shape": (
        lambda a, t: entry(a).update(shape=[8, 32]),
        "'w' of shape (8, 32), Intx(bits=4, block=(1, 32)), has fields that do not fit: qdata (8, 32) uint8, "
        "scale (8, 2) float32, zero_point (8, 2) int8; save it again",
    ),
    "transposed shape": (lambda a, t: entry(a).update(shape=[64, 8]), "has fields that do not fit"),
    "one dim": (lambda a, t: entry(a).update(shape=[512]), "has fields that do not fit"),
    "negative shape": (lambda a, t: entry(a).update(shape=[-8, -64]), "has fields that do not fit"),
    "codes cut": (lambda a, t: t.update({"w.qdata": t["w.qdata"][:, :30]}), "has fields that do not fit"),
    "rows cut": (lambda a, t: t.update({"w.qdata": t["w.qdata"][:7]}), "has fields that do not fit"),
    "scales cut": (lambda a, t: t.update({"w.scale": t["w.scale"][:5]}), "has fields that do not fit"),
    "codes of floats": (lambda a, t: t.update({"w.qdata": t["w.qdata"].float()}), "has fields that do not fit"),
    "flat scales": (lambda a, t: t.update({"w.scale": t["w.scale"].flatten()}), "has fields that do not fit"),
    "other bits": (lambda a, t: entry(a)["spec"].update(bits=3), "has fields that do not fit"),
    "no spec": (lambda a, t: entry(a).pop("spec"), "has a damaged header (KeyError: 'spec'); save it again"),
    "no version": (lambda a, t: a.pop("version"), "has a damaged header (KeyError: 'version'); save it again"),
    "version of text": (lambda a, t: a.update(version="new"), "has a damaged header (TypeError: "),
    "a list": (lambda a, t: "[]", "has a damaged header (TypeError: "),
    "no JSON": (lambda a, t: "{", "Expecting property name"),
    "entry of text": (lambda a, t: a["tensors"].update(w="x"), "has a damaged header"),
    "tie to nothing": (
        lambda a, t: a["tensors"].update(c={"same_as": "d", "parameter": False}),
        "has a damaged header (KeyError: 'd')",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(damage, tmp_path):
    path = tmp_path / "m.safetensors"
    change, expected = DAMAGE[damage]
    save({"w": INT4.quantize(weight((8, 64))), "b": torch.ones(3)}, path)
    rewritten(path, change)
    message = refusal(lambda: load(path))
    assert message.startswith(f"ao.load: {path}") and expected in message, message


def test_eight_bit_codes_of_another_shape_are_damage(tmp_path):
    path = tmp_path / "m.safetensors"
    save({"w": Intx(8, (-1, -1)).quantize(weight((8, 64)))}, path)
    rewritten(path, lambda a, t: t.update({"w.qdata": t["w.qdata"].reshape(64, 8)}))
    assert "has fields that do not fit: qdata (64, 8) int8" in refusal(lambda: load(path))


def test_damage_in_a_nested_field_names_it(tmp_path):
    path = tmp_path / "m.safetensors"
    save({"w": NF4.quantize(weight((8, 128)))}, path)
    rewritten(path, lambda a, t: entry(a)["fields"]["scale"].update(shape=[8, 3]))
    assert "'w.scale' of shape (8, 3), " in refusal(lambda: load(path))


def test_shards_of_different_checkpoints(tmp_path):
    save(BEFORE, tmp_path / "a", max_shard_size=16)
    save({"x": torch.ones(4), "y": torch.ones(4), "z": torch.ones(4)}, tmp_path / "b", max_shard_size=16)
    shard = "model-00002-of-00003.safetensors"
    shutil.copy(tmp_path / "b" / shard, tmp_path / "a" / shard)
    assert refusal(lambda: load(tmp_path / "a")) == (
        f"ao.load: {tmp_path / 'a' / shard}: model.safetensors.index.json and this file differ in ['t1', 'y']; "
        "copy or save all files again"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../a"}}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(text, tmp_path):
    save(BEFORE, tmp_path, max_shard_size=16)
    (tmp_path / INDEX).write_text(text)
    assert refusal(lambda: load(tmp_path)).startswith(f"ao.load: {tmp_path / INDEX} is no index of shards (")
    save(AFTER, tmp_path, max_shard_size=16)  # a new checkpoint mends it
    assert_same(AFTER, load(tmp_path))
    assert clean(tmp_path)


def test_a_header_that_lies_about_its_length(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "is no safetensors file, or is cut short" in refusal(lambda: load(path))


def test_custom_tables_survive(tmp_path):
    spec = Codebook(tuple(i / 8 for i in range(-8, 8)), (1, 32))
    q = spec.quantize(weight((8, 64)))
    save({"w": q}, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors")["w"].spec == spec
