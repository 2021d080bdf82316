"""Fake sparsity: training a dense weight with the zeros, and the rounding, that it will have, on any device.

It is quantization-aware training with the format `Sparse24(values, prune=True)`: `fake_sparsify_(model)`, train, and
`quantize_(model, QATConfig(step="convert"))` gives a model that computes the same. With `decay` what is pruned is also pulled
towards zero (SR-STE, arXiv:2102.04010), so that fewer weights go back and forth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..dtypes import Sparse24, Spec
from ..quant import Config, Report, quantize_
from ..quant.qat import QATConfig
from ..quant.qat.layers import FakeQuantized


def fake_sparsify_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    values: Spec | None = None,
    act: Spec | None = None,
    decay: float = 2e-4,
) -> Report:
    """Have linear layers compute with two of four weights, and train all of them.

    values: how the two will be stored, such as `Intx(4, (1, 128))`, with which they are rounded as well; None for plain.
    act: how inputs are quantized.
    decay: what is pruned gets this times itself for a gradient, beside the one that passes straight through.
    filter_fn: which layers; as of `quantize_`.

    The same as `quantize_(model, QATConfig(Sparse24(values, prune=True, decay=decay, act=act)), filter_fn)`.
    """
    config: Config = QATConfig(Sparse24(values, prune=True, decay=decay, act=act))
    return quantize_(model, config, filter_fn)


class SparsitySchedule:
    """When layers with fake sparsity are sparse: in the steps from `begin` on and before `end`; else they are dense, and rounded
    as they will be.

    A late begin lets a model settle first, an early end trains the last steps dense, as 30 % of the steps at the end recover most
    of what 2:4 loses in pretraining. Call `step()` after each step of the optimizer.

    Raises ValueError for a model without fake sparsity.
    """

    def __init__(self, model: nn.Module, begin: int = 0, end: int | None = None) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, FakeQuantized) and isinstance(m.spec, Sparse24)]
        if not self.layers:
            raise ValueError("SparsitySchedule: no layer has fake sparsity; call fake_sparsify_(model) first")
        self.specs = [m.spec for m in self.layers]
        self.begin, self.end, self.steps = begin, end, 0
        self._set()

    def step(self) -> None:
        """One step of training is done."""
        self.steps += 1
        self._set()

    @property
    def is_sparse(self) -> bool:
        """Whether layers are sparse in the step that comes next."""
        return self.begin <= self.steps and (self.end is None or self.steps < self.end)

    def state_dict(self) -> dict[str, int]:
        """How many steps are done."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.steps = state["steps"]
        self._set()

    def _set(self) -> None:
        for layer, spec in zip(self.layers, self.specs):
            assert isinstance(spec, Sparse24)
            dense = None if spec.values is None else replace(spec.values, act=spec.act)
            layer.enabled = self.is_sparse or dense is not None
            layer.spec = spec if self.is_sparse or dense is None else dense
