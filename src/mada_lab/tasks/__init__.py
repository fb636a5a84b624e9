"""Tasks: what is trained in an experiment. Each kind has a file; ``registry.py`` lists them."""
