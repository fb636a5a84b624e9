"""Updates: what a family of optimizers is, and the families of MADA and OMADA. A new update belongs here."""

from mada_optim.families.base import Buffers, Coefficient, Family, Shapes, is_frozen_at
from mada_optim.families.mada import MADAFamily
from mada_optim.families.numerics import cut, root
from mada_optim.families.orthogonal import OMADAFamily, OrthogonalMixture

__all__ = [
    "Buffers",
    "Coefficient",
    "Family",
    "MADAFamily",
    "OMADAFamily",
    "OrthogonalMixture",
    "Shapes",
    "cut",
    "is_frozen_at",
    "root",
]
