"""mada-optim: the optimizer that tunes itself while the model trains."""

from typing import Any

from mada_optim.families import Coefficient, Family, MADAFamily, OMADAFamily, OrthogonalMixture, is_frozen_at, root
from mada_optim.history.recorder import History
from mada_optim.learning import CoefficientSettings, LearningRule
from mada_optim.matrices import describe, matrix_parameters, orthogonalize
from mada_optim.matrices.groups import matrix_groups
from mada_optim.optimizers.avgrad import AVGrad
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.optimizers.mada import MADA
from mada_optim.optimizers.omada import OMADA
from mada_optim.optimizers.presets import available_optimizers, load_optimizer
from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.warn import warn

__version__ = "0.1.0"

__all__ = [
    "MADA",
    "OMADA",
    "AVGrad",
    "Coefficient",
    "CoefficientSettings",
    "Family",
    "History",
    "HypergradientOptimizer",
    "LearnedScale",
    "LearningRule",
    "MADAFamily",
    "OMADAFamily",
    "OrthogonalMixture",
    "SearchSettings",
    "available_optimizers",
    "describe",
    "is_frozen_at",
    "load_optimizer",
    "matrix_groups",
    "matrix_parameters",
    "orthogonalize",
    "root",
]


def __getattr__(name: str) -> Any:
    """Return what a former name stands for, with a warning."""
    if name == "is_special":
        warn("mada_optim.is_special is called is_frozen_at now", DeprecationWarning)
        return is_frozen_at
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
