"""Learning the coefficients: the hypergradient, the rule that moves them by it, and what users choose about both."""

from mada_optim.learning.hypergradient import align_and_advance
from mada_optim.learning.rule import LearnedTensors, LearningRule
from mada_optim.learning.settings import Bounds, CoefficientSettings, HyperLR, check_value, resolve_settings

__all__ = [
    "Bounds",
    "CoefficientSettings",
    "HyperLR",
    "LearnedTensors",
    "LearningRule",
    "align_and_advance",
    "check_value",
    "resolve_settings",
]
