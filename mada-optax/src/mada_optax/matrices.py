"""OMADA: Muon's direction for matrices, AdamW's for the rest, at learning rates that it finds by itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import optax

from mada_optax.coefficients import Number
from mada_optax.optimizer import Mask
from mada_optax.points import mada
from mada_optax.rule import ADAPTIVE, SearchSettings
from mada_optax.scale import learned_scale

# Muon's best rate was at most 0.03 in all experiments of the project. Small noisy runs may wander up to any bound.
SEARCH = replace(ADAPTIVE, bounds=(1e-8, 0.1))
RMS = 0.2
"""Root mean square of AdamW's step, which a matrix's gets as well (Liu et al., 2025)."""
_TABLES = {"embed", "embedding", "embeddings", "wte", "wpe", "head", "logits", "unembed", "unembedding"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
Matrices = Any | Callable[[optax.Params], Any]


def matrix_dimensions(params: optax.Params) -> Any:
    """Which parameters are matrices, by their shapes and names: a tree for :func:`omada`.

    Two-dimensional arrays with more than one row and column, unless the name of a part of the model that they are in
    ends in embed, embedding, wte, wpe, head, logits or unembed. Embeddings and output layers are tables of rows, and
    are optimized as vectors are (K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).

    Returns:
        A tree like the parameters: ``optax.contrib.MuonDimensionNumbers()`` for matrices, None for all others.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((9, 4)), "hidden": jnp.ones((4, 8)), "lm_head": jnp.ones((8, 9))}
    >>> [name for name, value in matrix_dimensions(params).items() if value is not None]
    ['hidden']
    """

    def dimensions(path: Any, param: jax.Array) -> Any:
        names = [_WORD.findall(jax.tree_util.keystr((key,))) for key in path]
        is_table = any(words and words[-1].lower() in _TABLES for words in names)
        is_matrix = param.ndim == 2 and min(param.shape) > 1 and not is_table
        return optax.contrib.MuonDimensionNumbers() if is_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def omada(
    schedule: optax.ScalarOrSchedule = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.99,
    eps: float = 1e-8,
    weight_decay: Number = 1e-2,
    mask: Mask | None = None,
    *,
    matrices: Matrices = matrix_dimensions,
    ortho_momentum: Number = 0.95,
    settings: SearchSettings | Mapping[str, SearchSettings] = SEARCH,
    held: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices and AdamW for the rest, at learning rates that are found in the first steps, and then held.

    It is :func:`learned_scale` around ``optax.partition``: ``optax.contrib.scale_by_muon`` for matrices, their steps as
    long as AdamW's, and :func:`mada` with nothing learned for the rest. Matrices have one scale, the rest another.

    Args:
        schedule: the shape of the schedule, a function of the number of steps so far, or a number. How large it is does
            not matter.
        b1: β1 of the rest. Default: 0.9.
        b2: β2 of the rest. Default: 0.99.
        eps: ε of the rest. Default: 1e-8.
        weight_decay: decoupled weight decay λ of all, multiplied by the learning rate. Default: 1e-2.
        mask: which parameters decay, as in ``optax.adamw``.
        matrices: which parameters are matrices: a tree, or a function from parameters to one, of
            ``optax.contrib.MuonDimensionNumbers`` for matrices and None for the rest. True is short for a
            two-dimensional one, False for None. Default: :func:`matrix_dimensions`, which goes by names. Name
            convolutions and projections of attention in more dimensions yourself.
        ortho_momentum: μ, the momentum of the orthogonalized direction. Default: 0.95.
        settings: of the search, see :func:`learned_scale`. Labels are ``"matrices"`` and ``"rest"``.
        held: rates that were found, ``{"matrices": 0.009, "rest": 0.009}``: no search.

    Returns:
        The transformation. ``optax.tree_utils.tree_get(state, "learned_rate")`` reads the rates.

    References:
        Jordan et al., `Muon: An optimizer for hidden layers in neural networks
        <https://kellerjordan.github.io/posts/muon/>`_, 2024

        Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025

    >>> import jax.numpy as jnp
    >>> tx = omada(optax.cosine_decay_schedule(1.0, 1000))
    >>> state = tx.init({"hidden": jnp.ones((4, 8)), "bias": jnp.zeros(8)})
    >>> {label: round(float(rate), 3) for label, rate in optax.tree_utils.tree_get(state, "learned_rate").items()}
    {'matrices': 0.001, 'rest': 0.001}
    """

    def dimensions(params: optax.Params) -> Any:
        """Return the dimensions of the parameters that are there: a part of a partition sees its own alone."""
        marks = matrices(params) if callable(matrices) else matrices
        return jax.tree.map(
            lambda mark, part: jax.tree.map(lambda _: _as_dimensions(mark), part), marks, params, is_leaf=_is_mark
        )

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(lambda mark: "rest" if mark is None else "matrices", dimensions(params), is_leaf=_is_mark)

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=ortho_momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(_match_rms, updates, dimensions(updates))),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(1.0),
    )
    rest = mada(1.0, b1, b2, eps, weight_decay, mask, hyper_lr=0.0)
    base = optax.partition({"matrices": muon, "rest": rest}, labels, mask_compatible_extra_args=True)
    return learned_scale(base, schedule, per=labels, settings=settings, held=held)


def _is_mark(node: Any) -> bool:
    return node is None or isinstance(node, (bool, optax.contrib.MuonDimensionNumbers))


def _as_dimensions(mark: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if isinstance(mark, bool):
        return optax.contrib.MuonDimensionNumbers() if mark else None
    return mark


def _match_rms(update: jax.Array, dimensions: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    """Give an orthogonalized matrix the root mean square of AdamW's step."""
    sides = [
        math.prod(update.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))
        for axes in (dimensions.reduction_axis, dimensions.output_axis)
    ]
    return RMS * math.sqrt(max(sides)) * update
