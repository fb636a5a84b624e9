"""mada-optim: the optimizer that tunes itself while the model trains."""

from mada_optim.coefficients import CoefficientSettings, LearningRule
from mada_optim.family import Coefficient, Family, MADAFamily, OMADAFamily, is_special, root
from mada_optim.history import History
from mada_optim.matrices import describe, matrix_parameters, orthogonalize
from mada_optim.matrices.groups import matrix_groups
from mada_optim.omada import OMADA
from mada_optim.optimizer import HypergradientOptimizer
from mada_optim.points import MADA, AVGrad, available_optimizers, load_optimizer
from mada_optim.scale import LearnedScale, SearchSettings

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
    "SearchSettings",
    "available_optimizers",
    "describe",
    "is_special",
    "load_optimizer",
    "matrix_groups",
    "matrix_parameters",
    "orthogonalize",
    "root",
]
