"""`Calibration`: watch what goes into the quantized modules of any model that runs meanwhile, for their static scales."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .nn import QModuleMixin


class Calibration(AbstractContextManager["Calibration"]):
    """A context in which the scale of each quantized input is found: the first max|x| / max(qtype), then a moving average.

    momentum: what the average keeps at each call.
    streamline: accepted: outputs are never quantized here, only inputs.
    debug: accepted; nothing is printed.
    """

    def __init__(self, *, momentum: float = 0.9, streamline: bool = True, debug: bool = False) -> None:
        self.momentum = momentum
        self._handles: list[Any] = []

    def __enter__(self) -> Calibration:
        self._handles = [
            register_module_forward_pre_hook(self._see_input),
            register_module_forward_hook(self._see_output),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_input(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None and args:
            module.observe("input_scale", args[0], self.momentum)

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None and isinstance(output, Tensor):
            module.observe("output_scale", output, self.momentum)
