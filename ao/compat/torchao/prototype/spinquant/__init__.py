"""torchao.prototype.spinquant: `ao.rotate_`."""

from __future__ import annotations

from typing import Any

from torch import nn

import ao

__all__ = ["apply_spinquant"]


def apply_spinquant(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """`ao.rotate_(model)`: rotate a language model so that it quantizes better. The arguments chose which rotations, and from
    which files they come; here all that leave the model's function as it is are made."""
    ao.rotate_(model)
