"""torchao.prototype: what it had, or has, before it is settled there."""
