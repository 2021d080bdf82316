"""Checkpoints: a state dict, quantized tensors included, in plain safetensors files. No pickle. Format version 1.

Names. A plain tensor is stored under its own name, a `QTensor` as its fields, each as `<name>.<field>`
(`layer.weight.qdata`, `layer.weight.scale`), and a field that is itself quantized one level deeper
(`layer.weight.scale.qdata`). All are contiguous. Two tensors that would need the same name are refused. Under its own
name (`layer.weight`) a `QTensor` leaves a guard, a uint8 tensor of shape (0,): a loader that does not know this format, and
would fill what it misses with random numbers, meets a shape that does not fit, and fails. Files without guards are read too.

Header. The metadata of a file (str to str) are `format`, which is "pt", and `ao`, the JSON text of

    {"version": 1, "tensors": {<name>: <entry>, ...}}        in the order of the state dict, ties after their first name

where an entry is one of

    null                                                     a plain tensor
    {"spec": <spec>, "dtype": "bfloat16", "shape": [N, K],   a QTensor: its Spec; the dtype and the shape to which it
     "fields": {<field>: <entry>, ...}}                      dequantizes; its fields, null or quantized themselves
    {"same_as": <name>, "parameter": <bool>}                 one more name of the tensor `<name>` above it in this file;
                                                             parameter: whether all of its names were nn.Parameters

and a spec is `Spec.to_dict()`: {"type": <class>, <field>: <value>, ...}, every field named, with tuples as lists and Specs
nested. The QTensor class is the one that belongs to the Spec. Tensors are tied if they are the same
view of the same memory (device, address, dtype, shape, strides); those that overlap in another way are stored apart.

Files. A path that ends in `.safetensors` is one file. Any other path is a folder, with `model.safetensors` or, above
`max_shard_size`, with shards and a `model.safetensors.index.json` as Hugging Face has them: {"metadata": {"total_size":
<bytes>}, "weight_map": {<stored name>: <file>, ...}}. Shards are called `model-00001-of-00003.safetensors`, or
`model-2-00001-of-00003.safetensors`, `model-3-...` where the folder has such files already. The fields of a QTensor and
the names of a tied tensor stay in one shard, whose header describes its own tensors only: each shard is a whole file.
Folders that another writer has cut elsewhere, with one header for all shards, are read too, and so are those whose index
lists the tensors rather than their fields, and whose shards of plain tensors alone have no header.

A folder is read by this rule, which is transformers' too: `model.safetensors` if there is one, else what the index
lists; other files do not count. `save` writes into no file that exists: each is made in a folder of its own beside it,
`.<name>.<32 hex digits>.tmp`, flushed to disk, and moved into place. One rename or removal makes the new checkpoint the
current one: moving `model.safetensors` into place, or the index, or, where shards follow a single file, removing
`model.safetensors` last. A save that is killed before this step leaves the old checkpoint whole, after it, the new one.
The next save that succeeds removes what was left over: all files of the names above that its own checkpoint does not
use. One process at a time may save to a path.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import QTensor, Spec

VERSION = 1
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_OURS = r"model\.safetensors(\.index\.json)?|model(-\d+)?-\d{5}-of-\d{5}\.safetensors"

Part = tuple[dict[str, Any], dict[str, Tensor]]
"""Entries of a header, and the plain tensors that they describe, by stored name."""


def save(
    model_or_state_dict: torch.nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a state dict to safetensors files, quantized tensors included, atomically replacing what was there.

    model_or_state_dict: a module stands for its state_dict(). Tensors may be on any device.
    path: a file if it ends in `.safetensors`, else a folder, made if need be.
    max_shard_size: bytes, or a string like "5GB" (5 * 10**9) or "512MiB", above which a folder gets several files.

    Takes memory for those tensors of one file that are not contiguous or not on the CPU.
    Raises TypeError for a value that is no tensor or has no form in a safetensors file; ValueError for names that
    clash, a tensor without values (meta device), a malformed max_shard_size. An earlier checkpoint stays as it was.
    """
    _safetensors()
    path, limit = _path("ao.save", path), _bytes(max_shard_size)
    if isinstance(model_or_state_dict, torch.nn.Module):
        model_or_state_dict = model_or_state_dict.state_dict(keep_vars=True)
    parts = _parts(model_or_state_dict)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, _shards(parts, None)[0])
        _sweep(path.parent, re.escape(path.name), keep=[path.name])
    else:
        path.mkdir(parents=True, exist_ok=True)
        _write_folder(path, _shards(parts, limit))


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu", mmap: bool = True) -> dict[str, Tensor]:
    """The state dict that `save` wrote to a file or a folder, for `model.load_state_dict(ao.load(path), assign=True)`.

    device: where the tensors go, whichever device they were saved from.
    mmap: on the CPU, map the files, so that a page is read when it is first used. Writing to such a tensor leaves the
        file alone. False reads everything now.

    Without `assign=True` a model whose parameters are plain takes the decoded values and stays as large as it was: PyTorch copies
    into what is there. A model that is quantized already takes the codes.

    requires_grad is False throughout. A tied tensor is one object under all of its names: an nn.Parameter if all of
    them were, since load_state_dict(assign=True) keeps a Parameter, but would wrap a tensor anew for every name.
    Raises FileNotFoundError for a path or a shard that is not there; ValueError for a file that is damaged, was not
    written by `save`, or needs a newer ao.
    """
    path, device = _path("ao.load", path), torch.device(device)
    if not path.is_dir():
        return _read({path: None}, device, mmap)
    if (path / SINGLE).exists():
        return _read({path / SINGLE: None}, device, mmap)
    if not (path / INDEX).exists():
        raise FileNotFoundError(f"ao.load: {path} holds neither {SINGLE} nor {INDEX}; give a path that ao.save wrote")
    listed: dict[Path, set[str] | None] = {}
    for name, file in sorted(_weight_map(path).items(), key=lambda item: item[1]):
        names = listed.setdefault(path / file, set())
        assert names is not None
        names.add(name)
    return _read(listed, device, mmap)


def _path(who: str, path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{who}: path must be a str or a Path, got {path!r}")
    return Path(path)


# For those who write and read the files themselves.


def flatten(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save` writes to one file: the plain tensors by stored name, and the metadata that describe them.

    Raises what `save` does.
    """
    ((entries, leaves),) = _shards(_parts(state_dict), None)
    return leaves, _metadata(entries)


def read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The entries by name, from the metadata of a file. Raises ValueError for a file that is none of `save`'s."""
    if "ao" not in metadata:
        raise ValueError("not written by ao.save (its header has no 'ao'); read it with safetensors.torch.load_file")
    header = json.loads(metadata["ao"])
    if header["version"] > VERSION:
        raise ValueError(f"its format is version {header['version']}, this ao reads up to {VERSION}; upgrade ao")
    return dict(header["tensors"])


def quantized_entries(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Those of `read_header` that describe a quantized tensor which the file holds."""
    return {n: e for n, e in read_header(metadata).items() if e is not None and "same_as" not in e}


def stored_names(name: str, entry: Mapping[str, Any] | None) -> Iterator[str]:
    """The stored names of the fields of a tensor, of a nested QTensor the names of its own."""
    if entry is None:
        yield name
    else:
        for field, inner in entry["fields"].items():
            yield from stored_names(f"{name}.{field}", inner)


def unflatten(
    name: str, entry: Mapping[str, Any] | None, get: Callable[[str], Tensor], checked: set[Hashable] | None = None
) -> Tensor:
    """The tensor of an entry of the header, from its plain tensors: `get(stored name)`.

    checked: keeps what has been found to fit, for the next tensors that are much alike.
    Raises ValueError for fields that do not fit the entry or one another.
    """
    return _tensor(name, entry, get, set() if checked is None else checked)


def apart(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors as `safetensors.torch.save_file` takes them: contiguous, on the CPU, each in memory of its own."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, t in leaves.items():
        t = t.resolve_conj().resolve_neg().cpu().contiguous()
        tensors[name] = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())
    return tensors


# From a state dict to files.


def _parts(state: Mapping[str, Tensor]) -> list[Part]:
    """One part for each tensor, all of its names included."""
    tied: dict[Hashable, list[str]] = {}
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"ao.save stores tensors, and {name!r} is of type {type(t).__name__}; leave it out")
        memory = [_memory(leaf) for _, leaf in _leaves(name, t)]
        tied.setdefault((repr(entry_of(t)), *memory), []).append(name)
    owners = {**dict(zip(state, state, strict=True)), "__metadata__": "the header of a safetensors file"}
    parts = []
    for name, *others in tied.values():
        leaves = dict(_leaves(name, state[name]))
        if isinstance(state[name], QTensor):
            leaves[name] = torch.empty(0, dtype=torch.uint8)
        for stored in leaves:
            if (owner := owners.setdefault(stored, name)) != name:
                raise ValueError(
                    f"ao.save: {name!r} is stored as {stored!r}, the name of {owner!r}; rename one of them"
                )
        parameter = all(isinstance(state[n], torch.nn.Parameter) for n in (name, *others))
        entries = {name: entry_of(state[name]), **{n: {"same_as": name, "parameter": parameter} for n in others}}
        parts.append((entries, leaves))
    return parts


def entry_of(t: Tensor) -> dict[str, Any] | None:
    """The entry of the header that describes a tensor. Its values do not matter: it may be on the meta device."""
    if not isinstance(t, QTensor):
        return None
    fields = {field: entry_of(f) for field, f in t.fields().items()}
    return {"spec": t.spec.to_dict(), "dtype": _dtype_name(t), "shape": list(t.shape), "fields": fields}


def _dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _leaves(name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of which `t` is made, by stored name."""
    if isinstance(t, QTensor):
        if type(t) is not t.spec.tensor_type:
            raise TypeError(
                f"ao.save: {name!r} is a {type(t).__name__}, which {t.spec} does not restore; convert it first"
            )
        for field, f in t.fields().items():
            yield from _leaves(f"{name}.{field}", f)
    elif type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
        raise TypeError(
            f"ao.save stores dense tensors and QTensors, and {name!r} is a {type(t).__name__} of layout {t.layout}; "
            "convert it first (.full_tensor() of a DTensor, .to_dense() of a sparse tensor)"
        )
    elif t.is_meta:
        raise ValueError(f"ao.save: {name!r} is on the meta device and has no values to save; load some first")
    else:
        yield name, t.detach()


def _memory(t: Tensor) -> Hashable:
    """Equal for equal views of the same memory. Empty tensors have none, and are never tied."""
    return (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg()) if t.numel() else object()


def _shards(parts: list[Part], limit: int | None) -> list[Part]:
    """The parts joined, in order, into as few as stay within `limit` bytes. None is cut."""
    shards: list[Part] = [({}, {})]
    size = 0
    for entries, leaves in parts:
        more = sum(t.nbytes for t in leaves.values())
        if limit is not None and size and size + more > limit:
            shards.append(({}, {}))
            size = 0
        shards[-1][0].update(entries)
        shards[-1][1].update(leaves)
        size += more
    return shards


def _bytes(size: int | str) -> int:
    units = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", size) if isinstance(size, str) else None
    if units:
        size = int(float(units[1]) * (1024 if units[3] else 1000) ** " KMGT".index(units[2] or " "))
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"ao.save: max_shard_size is in bytes, or like '5GB' or '512MiB', got {size!r}")
    return size


def _write_folder(folder: Path, shards: list[Part]) -> None:
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        _sweep(folder, _OURS, keep=[SINGLE])
        return
    names = _unused_names(folder, len(shards))
    total = sum(t.nbytes for _, leaves in shards for t in leaves.values())
    weight_map = {stored: name for name, (_, leaves) in zip(names, shards, strict=True) for stored in leaves}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    begun: list[str] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            begun.append(name)
            _write(folder / name, shard)
        begun.append(INDEX)
        _replace(folder / INDEX, lambda file: file.write_text(index, encoding="utf-8"))
        (folder / SINGLE).unlink(missing_ok=True)
    except BaseException:
        # Even so the new checkpoint may be the current one, if this is an interrupt that came late.
        with contextlib.suppress(OSError, ValueError):
            _sweep(folder, "|".join(map(re.escape, begun)), keep=_current(folder))
        raise
    _sweep(folder, _OURS, keep=[INDEX, *names])


def _unused_names(folder: Path, count: int) -> list[str]:
    prefixes = ("model" if i == 1 else f"model-{i}" for i in itertools.count(1))
    series = ([f"{p}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] for p in prefixes)
    return next(names for names in series if not any((folder / name).exists() for name in names))


def _current(folder: Path) -> list[str]:
    """The files that `load` would read."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    return [INDEX, *_weight_map(folder).values()] if (folder / INDEX).exists() else []


def _sweep(folder: Path, names: str, keep: Collection[str]) -> None:
    """Remove the files whose name matches the pattern `names`, and what killed runs left of such, except for `keep`."""
    for file in folder.iterdir():
        if file.name in keep or not re.fullmatch(rf"{names}|\.({names})\.[0-9a-f]{{32}}\.tmp", file.name):
            continue
        if file.is_dir():
            shutil.rmtree(file, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # Windows keeps a file that is mapped; the next save will try again
                file.unlink()


def _metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "ao": json.dumps({"version": VERSION, "tensors": entries})}


def _write(path: Path, part: Part) -> None:
    entries, leaves = part
    tensors = apart(leaves)
    save_file = _safetensors().torch.save_file
    try:
        with writing(path):
            _replace(path, lambda file: save_file(tensors, file, metadata=_metadata(entries)))
    except KeyError as e:
        names = [name for name, t in tensors.items() if t.dtype in e.args]
        raise TypeError(f"ao.save: safetensors has no {e}, the dtype of {names}; convert it first") from e


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a disk refuses is an OSError with the name of the file: safetensors' own error is none, and others lack the name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        found = re.search(r"I/O error: (.*)", str(error))
        if found is None:
            raise
        raise OSError(f"{path} cannot be written: {found[1]}") from error


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Make `path` with `write(file)` so that it is at any moment the old file or the new one, whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:  # of the path that was asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        file = temporary / path.name
        write(file)
        # safetensors 0.8 makes files that nobody else may read; the folder has the mode that the umask gives.
        file.chmod(temporary.stat().st_mode & 0o666)
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(file, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems cannot flush a folder
                os.fsync(folder)
            os.close(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# From files to a state dict.


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        if any(Path(file).name != file for file in weight_map.values()):
            raise ValueError("it lists files outside of its folder")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"ao.load: {folder / INDEX} is no index of shards ({e}); copy or save it again") from e
    return weight_map


def _read(files: Mapping[Path, set[str] | None], device: torch.device, mmap: bool) -> dict[str, Tensor]:
    """The tensors of one file, or of the shards of a folder, with the stored names that the index gives for each."""
    safe_open = _safetensors().safe_open
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as opened:
        owners: dict[str, Any] = {}
        entries: dict[Path, dict[str, Any]] = {}
        names: dict[Path, set[str]] = {}
        handles: dict[Path, Any] = {}
        for path, listed in files.items():
            with _reading(path):
                if not path.exists():
                    raise FileNotFoundError(
                        f"ao.load: there is no {path}; "
                        + ("copy it too" if listed else "give a path that ao.save wrote")
                    )
                if not path.is_file():
                    raise OSError(f"ao.load: {path} is no ordinary file; give a path that ao.save wrote")
                handles[path] = opened.enter_context(safe_open(path, framework="pt"))
        any_header = any("ao" in (file.metadata() or {}) for file in handles.values())
        for path, listed in files.items():
            with _reading(path):
                file = handles[path]
                names[path], header = set(file.keys()), file.metadata() or {}
                fields = any(name.rpartition(".")[0] in names[path] for name in names[path])  # beside their guards
                if "ao" in header or not any_header or fields:
                    entries[path] = read_header(header)
                else:
                    entries[path] = dict.fromkeys(names[path])
                # Other writers list tensors, not their fields; in a file, each has its guard under its own name.
                tensors_only = {n for n, e in entries[path].items() if e is None or "same_as" not in e}
                if listed is not None and listed != names[path] and listed != tensors_only:
                    raise ValueError(
                        f"{INDEX} and this file differ in {sorted(listed ^ names[path])}; copy or save all files again"
                    )
                owners.update(dict.fromkeys(names[path], file))

        def get(name: str) -> Tensor:
            if name not in owners:
                raise ValueError(f"it lacks {name!r}, which its header describes; save it again")
            t: Tensor = owners.pop(name).get_tensor(name)
            return t.to(device, copy=not mmap)

        for path in files:
            with _reading(path):
                _tensors(entries[path], get, tensors)
                for name, entry in entries[path].items():
                    if entry is not None and "same_as" not in entry:
                        owners.pop(name, None)  # its guard
        for path in files:
            with _reading(path):
                if undescribed := names[path] & owners.keys():
                    raise ValueError(
                        f"it holds {sorted(undescribed)}, which its header does not describe; save it again"
                    )
    return tensors


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of an error which file it is about, and what to do."""
    try:
        yield
    except _safetensors().SafetensorError as e:
        raise ValueError(f"ao.load: {path} is no safetensors file, or is cut short ({e}); copy or save it again") from e
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"ao.load: {path} has a damaged header ({type(e).__name__}: {e}); save it again") from e
    except ValueError as e:
        raise ValueError(f"ao.load: {path}: {e}") from e


def _tensors(entries: Mapping[str, Any], get: Callable[[str], Tensor], tensors: dict[str, Tensor]) -> None:
    """Add to `tensors` those that `entries` describe and that are not there yet."""
    checked: set[Hashable] = set()
    for name, entry in entries.items():
        if name in tensors:
            continue
        if entry is None or "same_as" not in entry:
            tensors[name] = _tensor(name, entry, get, checked)
            continue
        first = entry["same_as"]
        if entry["parameter"] and not isinstance(tensors[first], torch.nn.Parameter):
            tensors[first] = torch.nn.Parameter(tensors[first], requires_grad=False)
        tensors[name] = tensors[first]


def _tensor(name: str, entry: Mapping[str, Any] | None, get: Callable[[str], Tensor], checked: set[Hashable]) -> Tensor:
    """The tensor of an entry. checked: what `fits` has approved; the layers of a model are much alike."""
    if entry is None:
        return get(name)
    spec, shape, dtype = Spec.from_dict(entry["spec"]), torch.Size(entry["shape"]), getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}, no floating-point dtype of torch; save it again")
    fields: dict[str, Any] = {
        field: _tensor(f"{name}.{field}", inner, get, checked) for field, inner in entry["fields"].items()
    }
    if unknown := sorted(fields.keys() - spec.tensor_type.roles.keys()):
        raise ValueError(f"{name!r}: a {spec.tensor_type.__name__} has no field {unknown}; upgrade ao")
    cause = None
    try:
        q = spec.tensor_type(spec, dtype, shape, **fields)
        form = (repr(entry), *((t.shape, t.dtype) for t in fields.values()))
        if form in checked or fits(q):
            checked.add(form)
            return q
    except Exception as e:  # decode was written for fields that fit, and fails in ways of its own for others
        cause = e
    found = ", ".join(f"{field} {tuple(t.shape)} {_dtype_name(t)}" for field, t in fields.items())
    raise ValueError(
        f"{name!r} of shape {tuple(shape)}, {spec}, has fields that do not fit: {found}; save it again"
    ) from cause


def fits(q: QTensor) -> bool:
    """Whether each field has a shape that its role allows, and they decode to the shape of `q`."""
    roles = {field: type(q).roles[field] for field in q.fields()}
    ranked = [t for field, t in q.fields().items() if roles[field] in ("elements", "per_block")]
    if any(t.dim() != q.dim() for t in ranked):
        return False
    if any(f > max(n, 1) for t in ranked for f, n in zip(t.shape, q.shape, strict=True)):
        return False
    # Decoding on the meta device looks at shapes only. A private layout is its device's own business.
    return "opaque" in roles.values() or q.map(lambda t: t.to("meta")).decode_scaled().shape == q.shape


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("saving and loading checkpoints needs safetensors: pip install 'ao-lowbit[hf]'") from e
    return safetensors
