"""Experiments: run one training, compare optimizers on equal terms, draw what happened.

Needs ``pip install 'mada-optim[experiments]'``. The command ``mada`` is a thin layer over this package.
"""
