"""The matrices of a model: which parameters are some, how they lie in a tensor, and their orthogonalization."""

from mada_optim.matrices.directions import check_options, orthogonalize
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.rows import normalize_rows
from mada_optim.matrices.which import matrix_parameters, may_be_matrix

__all__ = ["Layout", "check_options", "matrix_parameters", "may_be_matrix", "normalize_rows", "orthogonalize"]
