"""Choose the format of every layer by measuring."""
