"""What a model's layers see: observers, the statistics they gather, and the passes over the data."""
