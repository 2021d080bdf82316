"""torchao.prototype.quant_logger: the range of each parameter, and of each input of a linear layer, one line each.

    t=act, c=0, fqn='0.weight', op='linear', extra='MKN=1|128|256', max_abs=3.33, avg=0.00, std=1.00

The lines go to stdout, or to a CSV file (`enable_log_stats_to_file`), or whole tensors to a folder
(`enable_log_tensor_save_tensors_to_disk`). All of it goes through the operator quant_logger::log_tensor, also in compiled models;
defining it anew with torch.library.custom_op says what else to do with a tensor.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ao import QTensor

__all__ = [
    "add_activation_loggers",
    "enable_log_stats_to_file",
    "enable_log_tensor_save_tensors_to_disk",
    "log_parameter_info",
    "log_tensor",
    "reset_counter",
]

_FIELDS = ("tag", "counter", "fqn", "op", "extra", "max_abs", "avg", "std")


class _State:
    counter = 0
    file: Path | None = None
    folder: Path | None = None


@torch.library.custom_op("quant_logger::log_tensor", mutates_args=("x",))
def log_tensor(x: Tensor, fqn: str, op: str, tag: str, extra: str | None = None) -> None:
    """Log one tensor."""
    number, _State.counter = _State.counter, _State.counter + 1
    if _State.folder is not None:
        torch.save(x.detach().clone(), _State.folder / f"{tag}_{number}_{fqn}_{op}.pt")
        return
    wide = x.detach().float()
    stats = [f"{float(v):.6g}" for v in (wide.abs().max(), wide.mean(), wide.std(correction=0))]
    if _State.file is not None:
        with _State.file.open("a", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerow([tag, number, fqn, op, extra or "", *stats])
        return
    more = "" if extra is None else f", extra={extra!r}"
    largest, mean, std = (f"{float(v):.2f}" for v in stats)
    sys.stdout.write(f"t={tag}, c={number}, fqn={fqn!r}, op={op!r}{more}, max_abs={largest}, avg={mean}, std={std}\n")


log_tensor.__doc__ = "Log one tensor, whatever the operator does with it by now."


def reset_counter() -> None:
    """Count from 0 again."""
    _State.counter = 0


def enable_log_stats_to_file(filename: str | Path) -> None:
    """Write lines of CSV to a file, which is begun anew, in place of stdout."""
    _State.file, _State.folder = Path(filename), None
    _State.file.write_text(",".join(_FIELDS) + "\n", encoding="utf-8")


def enable_log_tensor_save_tensors_to_disk(save_dir: str | Path) -> None:
    """Save whole tensors to a folder in place of writing lines."""
    _State.folder, _State.file = Path(save_dir), None
    _State.folder.mkdir(parents=True, exist_ok=True)


def log_parameter_info(model: nn.Module) -> None:
    """Log every parameter of a model."""
    for name, p in model.named_parameters():
        plain = p.dequantize() if isinstance(p, QTensor) else p.detach()
        torch.ops.quant_logger.log_tensor(plain, name, "", "param", None)


def add_activation_loggers(model: nn.Module) -> None:
    """Have every linear layer log its input, from now on at each call.

    A compiled model logs where no gradients are asked for (torch.no_grad): to the compiler the input counts as written.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_logger(f"{name}.weight" if name else "weight"))


def _logger(fqn: str) -> Callable[[Any, Any], None]:
    def log(module: Any, args: Any) -> None:
        x = args[0]
        rows = x.numel() // x.shape[-1]
        shape = f"MKN={rows}|{module.in_features}|{module.out_features}"
        torch.ops.quant_logger.log_tensor(x.detach(), fqn, "linear", "act", shape)

    return log
