"""The matrices of a model: which parameters are some, how they lie in a tensor, and their orthogonalization."""

from mada_optim.matrices.directions import orthogonalize
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.shards import orthogonalize_shared
from mada_optim.matrices.which import matrix_parameters, may_be_matrix

__all__ = ["Layout", "matrix_parameters", "may_be_matrix", "orthogonalize", "orthogonalize_shared"]
