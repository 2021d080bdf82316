"""torchao.prototype.quant_logger: the ranges of parameters and activations."""

from .quant_logger import (
    add_activation_loggers,
    enable_log_stats_to_file,
    enable_log_tensor_save_tensors_to_disk,
    log_parameter_info,
    log_tensor,
    reset_counter,
)

__all__ = [
    "add_activation_loggers",
    "enable_log_stats_to_file",
    "enable_log_tensor_save_tensors_to_disk",
    "log_parameter_info",
    "log_tensor",
    "reset_counter",
]
