"""torchao.core: what a config is."""
