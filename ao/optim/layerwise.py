"""`LayerwiseOptimizer`: updates whose size depends on the size of the parameter as a whole, as LARS and LAMB have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ao.dtypes import QTensor, Spec

from .optimizer import LowBitOptimizer
from .parts import Part, Used
from .rows import Rows, state_fields, to_planes
from .sharded import local, shard_like, unshard
from .stochastic_rounding import stochastic_round


class Layer(Part):
    """One parameter. A step writes the update, float32, in the place of a copy of the parameter; `apply` does the rest."""

    def __init__(self, names: Sequence[str], used: Used, specs: tuple[Spec | None, ...]) -> None:
        super().__init__(names, used, specs)
        self.dtype = torch.float32  # of what a step writes

    def rows(self) -> list[Rows]:
        mine = self.locals[0]
        self._values = mine.to(torch.float32).dequantize() if isinstance(mine, QTensor) else mine.float()
        self._new = self._values.clone(memory_format=torch.contiguous_format)
        if not mine.numel():  # a rank may have none
            return []
        width = next((spec.block[-1] for spec in self.specs if spec is not None), None)
        states = [local(self.states[0][name]) for name in self.names]
        fields = [
            (t.view(-1),) if spec is None else state_fields(t.blocks, self.planes)
            for spec, t in zip(self.specs, states)
        ]
        grad = self.grads()[0].contiguous()
        return [Rows(to_planes(self._new, width, self.planes), to_planes(grad, width, self.planes), fields)]

    def finish(self) -> None:
        self.steps += 1

    def apply(self, lr: float | Tensor, decay: float, most: float, stochastic: bool) -> None:
        """Write the parameter, from the update that the step has left."""
        mine, p = self.locals[0], self.params[0]
        ratio = _ratio(shard_like(self._values, p), shard_like(self._new, p), most)
        new = self._values * (1 - lr * decay) - self._new * (lr * ratio)
        if stochastic and mine.dtype == torch.bfloat16:
            new = stochastic_round(new, int(torch.randint(2**31 - 1, (), device="cpu")))
        mine.copy_(new)
        del self._values, self._new


class LayerwiseOptimizer(LowBitOptimizer):
    """An optimizer whose rule gives an update u in place of the new parameter, which then becomes

    param * (1 - lr * decay) - lr * min(1, max_unorm * |param| / |u|) * u

    |param| and |u| are the norms of the whole tensors, over all ranks for a DTensor. A parameter of zeros has no size to
    compare with: its update is u, as it is. max_unorm = 0 compares nothing.

    The rule runs as that of any other optimizer, in compiled graphs, on a float32 copy of one parameter at a time.
    """

    alone: ClassVar[type[Part] | None] = Layer

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not group["max_unorm"] >= 0:
            raise ValueError(f"{type(self).__name__}: max_unorm must not be negative, got {group['max_unorm']!r}")

    def decay(self, group: dict[str, Any]) -> float:
        """The weight decay beside u."""
        return 0.0

    def _update(self, group: dict[str, Any], part: Part) -> None:
        assert isinstance(part, Layer)
        super()._update(group, part)
        lr = group["lr"].detach().squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        part.apply(lr, self.decay(group), float(group["max_unorm"]), bool(group["bf16_stochastic_round"]))


def _ratio(param: Tensor, update: Tensor, most: float) -> Tensor:
    """min(1, most * |param| / |update|), and 1 where that says nothing. A NaN is left to the update."""
    size, length = (unshard(torch.linalg.vector_norm(t)) for t in (param, update))
    return torch.where((length > most * size) & (size > 0) & (most > 0), most * size / length, 1.0)
