"""The part of vLLM that a quantization plugin meets: registration, linear layers that fuse and shard, loading by name.

Written from vLLM's interface, for tests only: `install()` puts it into `sys.modules`.
"""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

REGISTRY: dict[str, type] = {}


def register_quantization_config(name: str) -> Any:
    def register(cls: type) -> type:
        REGISTRY[name] = cls
        return cls

    return register


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


def set_weight_attrs(weight: Tensor, attrs: dict[str, Any] | None) -> None:
    for key, value in (attrs or {}).items():
        assert not hasattr(weight, key), f"overwrites {key}"
        setattr(weight, key, value)


class WeightsMapper:
    """What turns stored names into those of parameters: patterns, each tried in turn."""

    def __init__(self, orig_to_new_regex: dict[re.Pattern[str], str]) -> None:
        self.patterns = orig_to_new_regex

    def map_name(self, name: str) -> str:
        for pattern, new in self.patterns.items():
            name = pattern.sub(new, name)
        return name


class LinearBase(nn.Module):
    """`n` rows in `parts` below each other, of which this rank has every `world`-th share; or `k` columns, if by_input."""

    def __init__(
        self,
        parts: list[int],
        k: int,
        method: Any,
        dtype: torch.dtype,
        rank: int = 0,
        world: int = 1,
        by_input: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.world, self.by_input = rank, world, by_input
        self.parts = parts if by_input else [n // world for n in parts]
        columns = k // world if by_input else k
        self.quant_method = method
        method.create_weights(self, columns, self.parts, k, sum(parts), dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard: int | None = None) -> None:
        target = param.data
        output_dim, input_dim = getattr(param, "output_dim", None), getattr(param, "input_dim", None)
        if self.by_input and input_dim is not None:
            size = target.shape[input_dim]
            loaded = loaded.narrow(input_dim, self.rank * size, size)
        elif not self.by_input and output_dim is not None:
            if shard is not None:
                target = target.narrow(output_dim, sum(self.parts[:shard]), self.parts[shard])
            size = target.shape[output_dim]
            loaded = loaded.narrow(output_dim, self.rank * size, size)
        assert target.shape == loaded.shape, (target.shape, loaded.shape)
        target.copy_(loaded)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x)


def load(layer: nn.Module, tensors: dict[str, Tensor], parts: list[str]) -> None:
    """Load what is called `<part>.<name>` into the parameters of `layer`, as vLLM's models do: what is below a parameter's
    name is refused."""
    params = dict(layer.named_parameters())
    mapper = REGISTRY["ao"].get_checkpoint_weight_mapper()
    for name, t in tensors.items():
        for i, part in enumerate(parts):
            if name.startswith(part + "."):
                leaf, _, rest = mapper.map_name(name).removeprefix(part + ".").partition(".")
                assert not rest, f"Attempted to load nested weight {rest} into a single parameter {leaf}"
                param = params[leaf]
                param.weight_loader(param, t, *([i] if len(parts) > 1 else []))
    layer.quant_method.process_weights_after_loading(layer)


def install() -> None:
    """Make `import vllm` find this."""
    names = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
