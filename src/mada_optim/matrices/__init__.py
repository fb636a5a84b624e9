"""The matrices of a model: which parameters are some, how they lie in a tensor, and their orthogonalization."""

from mada_optim.matrices.directions import check_options, orthogonalize
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.rows import normalize_rows
from mada_optim.matrices.shards import orthogonalize_shared
from mada_optim.matrices.table import Description, describe
from mada_optim.matrices.which import Parameter, classify, matrix_parameters, may_be_matrix

__all__ = [
    "Description",
    "Layout",
    "Parameter",
    "check_options",
    "classify",
    "describe",
    "matrix_parameters",
    "may_be_matrix",
    "normalize_rows",
    "orthogonalize",
    "orthogonalize_shared",
]
