"""Which parameters of a model are matrices."""

from __future__ import annotations

from torch import Tensor, nn


def matrix_parameters(model: nn.Module) -> list[Tensor]:
    """Return the real parameters of two and more dimensions, without rows, columns, embeddings and the output layer.

    The rule that optimizers with an orthogonalized direction share (K. Jordan, "Muon: An optimizer for hidden layers in
    neural networks", 2024): a hidden matrix or convolution maps activations to activations, and its whole spectrum
    counts; an embedding is a table of rows, and the output layer another. The output layer is the last module with such
    a weight; a weight that it shares with an embedding is an embedding. A table that is no ``nn.Embedding``, such as a
    parameter of positions with more than one row, cannot be told from a hidden matrix: give parameter groups then.

    Args:
        model: whose parameters they are.

    Returns:
        Each parameter once, in the order of ``model.parameters()``.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 10))
    >>> [tuple(weight.shape) for weight in matrix_parameters(model)]
    [(8, 4)]
    """
    excluded: set[Tensor] = set()
    last: list[Tensor] = []
    for module in model.modules():
        own: list[Tensor] = [param for param in module.parameters(recurse=False) if param.dim() >= 2]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            excluded.update(own)
        elif own:
            last = own
    excluded.update(last)
    return [param for param in model.parameters() if may_be_matrix(param) and param not in excluded]


def may_be_matrix(param: Tensor) -> bool:
    """Whether a parameter has the shape and the type of a matrix; embeddings have, too."""
    if param.is_complex() or param.dim() < 2:
        return False
    rows = param.size(0)
    return min(rows, param.numel() // max(rows, 1)) > 1
