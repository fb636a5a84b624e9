"""Several optimizers on equal terms: the same learning rates, seeds, initial weights, data order and steps."""

from __future__ import annotations

from collections.abc import Sequence

from mada_lab.errors import require
from mada_lab.optimizers.config import OptimizerConfig, parse
from mada_lab.run.config import RunConfig
from mada_lab.sweep.experiment import LR, SEED, Contender, Experiment


def comparison(optimizers: Sequence[str], lrs: Sequence[float], seeds: Sequence[int], base: RunConfig) -> Experiment:
    """Return the experiment of one stage that ``mada compare`` runs.

    Args:
        optimizers: names, or names with options as :func:`parse` takes them.
        lrs, seeds: each optimizer is trained at each of them.
        base: everything that the runs have in common; its optimizer and seed are replaced.
    """
    for name, values in (("optimizers", optimizers), ("lrs", lrs), ("seeds", seeds)):
        allowed = "a list that is not empty and repeats nothing"
        require(bool(values) and len(set(values)) == len(values), name, list(values), allowed)
    contenders = {spec: _contender(parse(spec)) for spec in optimizers}
    return Experiment("Comparison", base, contenders, {LR: lrs, SEED: seeds})


def _contender(optimizer: OptimizerConfig) -> Contender:
    return Contender(optimizer.name, optimizer.betas, optimizer.weight_decay, optimizer.options)
