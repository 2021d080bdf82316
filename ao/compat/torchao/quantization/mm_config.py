"""How a float8 product is computed, which the chip decides here."""

from __future__ import annotations

from typing import NamedTuple


class Float8MMConfig(NamedTuple):
    """How a float8 product is computed. Accepted and without effect."""

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False
