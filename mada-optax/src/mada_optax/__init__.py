"""mada-optax: the optimizers of mada-optim as transformations of optax, for JAX. torch is not needed."""

import warnings
from typing import Any

from mada_optax.family import Coefficient, Family, is_frozen_at, mada_family, root
from mada_optax.matrices import matrix_dimensions, omada
from mada_optax.optimizer import FamilyState, hypergradient_optimizer, scale_by_family
from mada_optax.points import avgrad, mada
from mada_optax.rule import ADAPTIVE, SearchSettings
from mada_optax.scale import LearnedScaleState, end_search, learned_scale

__version__ = "0.1.0"

__all__ = [
    "ADAPTIVE",
    "Coefficient",
    "Family",
    "FamilyState",
    "LearnedScaleState",
    "SearchSettings",
    "avgrad",
    "end_search",
    "hypergradient_optimizer",
    "is_frozen_at",
    "learned_scale",
    "mada",
    "mada_family",
    "matrix_dimensions",
    "omada",
    "root",
    "scale_by_family",
]


def __getattr__(name: str) -> Any:
    """Former names."""
    if name == "is_special":
        warnings.warn("mada_optax.is_special is called is_frozen_at now", DeprecationWarning, stacklevel=2)
        return is_frozen_at
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
