"""torchao.prototype.safetensors: `ao.save` and `ao.load` do this in one call each."""
