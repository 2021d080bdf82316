"""torchao.prototype.awq.api."""

from . import AWQConfig, awq_uintx, insert_awq_observer_

__all__ = ["AWQConfig", "awq_uintx", "insert_awq_observer_"]
