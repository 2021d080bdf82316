"""Rules: a config per layer, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..dtypes import Spec
from .algorithms.recipe import Recipe, RoundToNearest
from .config import Config, ModelConfig, to_json
from .read_format import read_format, with_recipe


@dataclass(frozen=True)
class FqnToConfig(Config):
    """A config per layer or per parameter, by fully qualified name.

    fqn_to_config: name -> config, Spec, name of a format, or None to leave the layer alone. A layer's weight takes the first
        that matches:
        1. the exact name of the parameter ("model.embed.weight"; also parameters of other names, such as 3-D experts)
        2. the exact name of the module ("model.embed")
        3. "re:" and a regular expression that matches the whole name of the parameter, in the order given
        4. the same for the module
        5. "_default", for what `quantize_` takes by default: linear layers, transformers' `Conv1D`, experts
    module_fqn_to_config: another name of the same parameter.

    Raises ValueError when both are given and differ, and for what is no regular expression. `quantize_` raises for a rule that
    matches nothing.
    """

    fqn_to_config: Mapping[str, Any] = field(default_factory=dict)
    module_fqn_to_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe != RoundToNearest():
            raise ValueError("FqnToConfig: give algorithm to the configs of the rules")
        a, b = dict(self.fqn_to_config), dict(self.module_fqn_to_config)
        if a and b and a != b:
            raise ValueError("FqnToConfig: give fqn_to_config or module_fqn_to_config, not two that differ")
        rules = {k: read_format(v, who=f"FqnToConfig: {k!r}") if isinstance(v, str) else v for k, v in (a or b).items()}
        for key in rules:
            try:
                re.compile(key[3:] if key.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"FqnToConfig: the rule {key!r} is no regular expression: {error}") from None
        object.__setattr__(self, "fqn_to_config", rules)
        object.__setattr__(self, "module_fqn_to_config", {})
        for name, config in self.fqn_to_config.items():
            if not (config is None or isinstance(config, (Config, Spec))) or isinstance(
                config, (FqnToConfig, ModelConfig)
            ):
                raise TypeError(
                    f"FqnToConfig: {name!r} must map to a config of weights, a Spec or None, got {config!r}"
                    + ("; give it the rules" if isinstance(config, ModelConfig) else "")
                )

    def rules_for(self, parameter: str) -> list[str]:
        """The rules that match a parameter, by its full name, "_default" aside: the first one counts."""
        module, _, leaf = parameter.rpartition(".")
        names = [parameter, module] if leaf == "weight" else [parameter]
        patterns = [key for key in self.fqn_to_config if key.startswith("re:")]
        exact = [name for name in names if name in self.fqn_to_config]
        return exact + [key for name in names for key in patterns if re.fullmatch(key[3:], name)]

    def with_recipe(self, algorithm: str | Recipe) -> Config:
        """The same rules, each config with another algorithm."""
        rules = self.fqn_to_config.items()
        return FqnToConfig({name: None if each is None else with_recipe(each, algorithm) for name, each in rules})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `Config.from_dict` reads."""
        return {"type": "FqnToConfig", "fqn_to_config": to_json(dict(self.fqn_to_config))}


ModuleFqnToConfig = FqnToConfig
