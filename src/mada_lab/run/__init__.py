"""One training run: its configuration as written and resolved, its folder and figure, the training."""
