"""When AVGrad converges and what interpolation buys: the statements of ``docs/theory.md`` as functions.

:mod:`~mada_lab.theory.conditions` says when the effective learning rate of AVGrad grows,
:mod:`~mada_lab.theory.bounds` bounds the mean squared gradient norm, :mod:`~mada_lab.theory.evidence` measures it
on functions whose constants are known. :mod:`~mada_lab.theory.scale` says where the rule of a learned scale comes to
rest, for ``docs/scale-theory.md``. These need torch alone; :mod:`~mada_lab.theory.figures` and
:mod:`~mada_lab.theory.scale_figure` draw.
"""

from mada_lab.theory.bounds import (
    Problem,
    avgrad_bound,
    best_rho,
    critical_rho,
    direct_bound,
    interpolation_bound,
    log_terms,
    newest_weight,
    step_sizes,
    variation,
)
from mada_lab.theory.conditions import gradient_threshold, mean_factor, rate_does_not_increase

__all__ = [
    "Problem",
    "avgrad_bound",
    "best_rho",
    "critical_rho",
    "direct_bound",
    "gradient_threshold",
    "interpolation_bound",
    "log_terms",
    "mean_factor",
    "newest_weight",
    "rate_does_not_increase",
    "step_sizes",
    "variation",
]
