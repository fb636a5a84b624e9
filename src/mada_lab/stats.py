"""Means and confidence intervals over a handful of seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 0.975 quantile of Student's t distribution for 1, ..., 30 degrees of freedom, as every statistics textbook tabulates
# it (NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2).
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(degrees: int) -> float:
    """0.975 quantile of Student's t; above 30 degrees of freedom that of 30, which errs on the wide side."""
    return _T_975[min(degrees, len(_T_975)) - 1]


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval; no half width for a single value.

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of ours - theirs, pair by pair."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
