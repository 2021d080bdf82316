"""`QuantizedModelForCausalLM` and its like: models of transformers and diffusers, saved with their quantization map.

A folder holds what the library writes, with the stored tensors of the quantized modules, and quanto_qmap.json.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ...dtypes import load, save
from .nn import QModuleMixin
from .optimizers import Optimizer
from .qtype import qtype
from .quantize import freeze, quantization_map, quantize, requantize

_MAP = "quanto_qmap.json"


class _Wrapped:
    """A quantized model; what is not here is the model's own."""

    weights_name: ClassVar[str]
    library: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or not quantization_map(model):
            raise ValueError(
                f"{type(self).__name__} takes a quantized model; use {type(self).__name__}.quantize(model)"
            )
        self._wrapped: Any = model

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self._wrapped(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self._wrapped(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._wrapped)

    @classmethod
    def quantize(
        cls,
        model: nn.Module,
        weights: qtype | str | None = None,
        activations: qtype | str | None = None,
        optimizer: Optimizer | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> Any:
        """Quantize and freeze a model in place. The parameters are those of `ao.compat.quanto.quantize`."""
        cls._check(model)
        quantize(model, weights, activations, optimizer, include, exclude)
        freeze(model)
        return cls(model)

    @classmethod
    def _check(cls, model: Any) -> None:
        """Raise ValueError for a model of another library."""
        if not type(model).__module__.startswith("torch.") and hasattr(model, "save_pretrained"):
            return
        raise ValueError(f"{cls.__name__} takes a model of {cls.library}, got {type(model).__name__}")

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the model to a folder. push_to_hub: upload it too; kwargs are then those of `push_to_hub`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        text = json.dumps(quantization_map(self._wrapped), indent=4)
        (folder / _MAP).write_text(text, encoding="utf-8")
        if push_to_hub:
            self._upload(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the model. kwargs: private, token, commit_message, revision, as of huggingface_hub."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._upload(Path(folder), repo_id, **kwargs)

    def _upload(self, folder: Path, repo_id: str, private: bool | None = None, token: Any = None, **kwargs: Any) -> Any:
        hub = importlib.import_module("huggingface_hub")
        made = hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        return hub.upload_folder(repo_id=made.repo_id, folder_path=str(folder), token=token, **kwargs)

    def _write(self, folder: Path) -> None:
        raise NotImplementedError

    @classmethod
    def _empty(cls, folder: Path, **kwargs: Any) -> nn.Module:
        """The float model of a folder, on meta."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """The model of a folder that `save_pretrained` wrote, or of a repository of the hub.

        Raises ValueError for a folder without a quantization map.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            hub = importlib.import_module("huggingface_hub")
            folder = Path(hub.snapshot_download(str(pretrained_model_name_or_path), **kwargs))
        if not (folder / _MAP).exists():
            raise ValueError(f"{folder} has no {_MAP}, and so is no model that {cls.__name__} wrote")
        found = json.loads((folder / _MAP).read_text(encoding="utf-8"))
        model: Any = cls._empty(folder)
        state: dict[str, Any] = {}
        for file in sorted(folder.glob(f"{cls.weights_name}*.safetensors")):
            state |= load(file)
        requantize(model, state, found)
        if getattr(model, "config", None) is not None and getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()
        return cls(model.eval())


class QuantizedTransformersModel(_Wrapped):
    """A quantized model of transformers. `auto_class`, of a subclass, says which class of transformers loads it."""

    weights_name = "model"
    library = "transformers"
    auto_class: ClassVar[str | type | None] = None

    def _write(self, folder: Path) -> None:
        model = self._wrapped
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        if getattr(model.config, "tie_word_embeddings", False) and any(isinstance(end, QModuleMixin) for end in ends):
            model.config.tie_word_embeddings = False
        model.config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        save({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def _empty(cls, folder: Path, **kwargs: Any) -> nn.Module:
        if cls.auto_class is None:
            raise ValueError(
                f"{cls.__name__} does not say which class to load; use QuantizedModelForCausalLM, or set auto_class"
            )
        hf: Any = importlib.import_module("transformers")
        auto: Any = getattr(hf, cls.auto_class) if isinstance(cls.auto_class, str) else cls.auto_class
        config = hf.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config)
        _buffers_again(model, lambda: auto.from_config(config))
        return model


class QuantizedModelForCausalLM(QuantizedTransformersModel):
    """A quantized causal language model."""

    auto_class = "AutoModelForCausalLM"


class QuantizedDiffusersModel(_Wrapped):
    """A quantized model of diffusers. `base_class`, of a subclass, says which class of diffusers loads it."""

    weights_name = "diffusion_pytorch_model"
    library = "diffusers"
    base_class: ClassVar[str | type | None] = None

    def _write(self, folder: Path) -> None:
        self._wrapped.save_config(folder)
        state = {name: t.contiguous() for name, t in self._wrapped.state_dict().items()}
        save(state, folder / f"{self.weights_name}.safetensors")

    @classmethod
    def _empty(cls, folder: Path, **kwargs: Any) -> nn.Module:
        if cls.base_class is None:
            raise ValueError(f"{cls.__name__} does not say which class to load; set base_class in a subclass of it")
        name = cls.base_class
        base: Any = getattr(importlib.import_module("diffusers"), name) if isinstance(name, str) else name
        config = base.load_config(folder)
        with torch.device("meta"):
            model: nn.Module = base.from_config(config)
        _buffers_again(model, lambda: base.from_config(config))
        return model


class QuantizedPixArtTransformer2DModel(QuantizedDiffusersModel):
    """A quantized transformer of PixArt."""

    base_class = "PixArtTransformer2DModel"


def _buffers_again(model: nn.Module, make: Any) -> None:
    """Compute the buffers that no file has, such as rotary frequencies, which a model on meta lacks."""
    stored = set(model.state_dict())
    lacking = [name for name, t in model.named_buffers() if t.is_meta and name not in stored]
    if lacking:
        with _no_init():
            other = dict(make().named_buffers())
        for name in lacking:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = other[name]


class _no_init(torch.overrides.TorchFunctionMode):
    """Leaves out the random numbers of new parameters, which are not used."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
