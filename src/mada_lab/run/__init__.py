"""One training run: its configuration, its folder, the training."""
