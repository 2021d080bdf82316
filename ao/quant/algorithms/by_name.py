"""The recipes by name, and those that are made of several."""

from __future__ import annotations

from .awq import AWQ
from .bias_correction import BiasCorrection
from .clip import Clip
from .gptq import GPTQ
from .hqq import HQQ
from .pruning import Magnitude, Wanda
from .recipe import Recipe, RoundToNearest
from .smoothquant import SmoothQuant
from .sparsegpt import SparseGPT

RECIPES: tuple[type[Recipe], ...] = (
    *(RoundToNearest, Clip, HQQ, GPTQ, AWQ, SmoothQuant, BiasCorrection),
    *(Magnitude, Wanda, SparseGPT),
)


def parse_recipe(algorithm: str | Recipe, who: str = "algorithm") -> Recipe:
    """A recipe by name ("rtn", "clip", "hqq", "gptq", "awq", "smoothquant", "bias_correction"), several of them joined by "+"
    ("awq+gptq": scale the channels as AWQ does, round as GPTQ does), or a Recipe itself.

    Raises ValueError for a name that is none, and for two recipes that cannot be joined; TypeError for anything else.
    """
    if isinstance(algorithm, Recipe):
        return algorithm
    if not isinstance(algorithm, str):
        raise TypeError(f"{who} must be a name such as 'gptq' or a Recipe such as GPTQ(), got {algorithm!r}")
    named = {cls.name: cls for cls in RECIPES}
    parts = algorithm.lower().split("+")
    unknown = [part for part in parts if part not in named]
    if unknown:
        raise ValueError(f"{who} must be among {', '.join(sorted(named))}, or several joined by '+'; got {algorithm!r}")
    *outer, last = (named[part] for part in parts)
    recipe = last()
    for cls in reversed(outer):
        if "rounding" not in cls.__dataclass_fields__:
            raise ValueError(
                f"{who}: {cls.name!r} decides the codes, and must come last; in {algorithm!r} it is followed by "
                f"{type(recipe).name!r}"
            )
        recipe = cls(rounding=recipe)  # type: ignore[call-arg]
    return recipe
