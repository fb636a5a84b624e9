"""MADA and AVGrad, as transformations of optax."""

from __future__ import annotations

import jax
import optax

from mada_optax.coefficients import Bounds, HyperLR, Number
from mada_optax.family import mada_family
from mada_optax.optimizer import Mask, hypergradient_optimizer


def mada(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 1e-2,
    mask: Mask | None = None,
    *,
    b3: Number = 0.0,
    rho: Number = 1.0,
    c: Number = 1.0,
    gamma: Number = 1.0,
    lion_betas: tuple[float, float] = (0.95, 0.98),
    hyper_lr: HyperLR = None,
    hyper_momentum: Number = 0.0,
    hyper_clip: Number = 10.0,
    hyper_warmup: int | jax.Array = 50,
    hyper_every: int | jax.Array = 1,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam, AVGrad, Yogi, Adan and Lion in one update, whose coefficients are learned while the model trains.

    The update is that of :func:`mada_family`. It starts as ``optax.adamw``, one line replaces the other::

        tx = optax.adamw(3e-4, b2=0.95, weight_decay=0.1)
        tx = mada(3e-4, b2=0.95, weight_decay=0.1)

    Args:
        learning_rate: η, a number or a schedule.
        b1: where β1 starts. Default: 0.9.
        b2: where β2 starts. Default: 0.999.
        eps: ε, added to the denominator. Default: 1e-8.
        weight_decay: decoupled weight decay λ, multiplied by the learning rate. Default: 1e-2.
        mask: which parameters decay, as in ``optax.adamw``: a tree of booleans, or a function from parameters to one.
        b3: where β3 starts, the share of Adan's gradient differences. Default: 0.0.
        rho: where ρ starts: 1 is Adam's second moment, 0 AVGrad's average of it. Default: 1.0.
        c: where c starts: 1 is Adam's second moment, 0 Yogi's. Default: 1.0.
        gamma: where γ starts: 1 is Adam's direction, 0 Lion's. Default: 1.0.
        lion_betas: κ, the two momentum coefficients of Lion, not learned. Default: (0.95, 0.98).
        hyper_lr: step sizes of the coefficients. None, the default: 5e-4 for b1, 0 for b2, 0.1 for the others. A
            number: one for all. A mapping, ``{"b1": 5e-4, "rho": 0.1}``: coefficients that it does not name are frozen.
            0.0: nothing is learned.
        hyper_momentum: momentum μ of the coefficients' gradient descent. Default: 0.0.
        hyper_clip: each component of the hypergradient is cut to [-hyper_clip, hyper_clip]. Default: 10.0.
        hyper_warmup: number of steps before the coefficients begin to move. Default: 50.
        hyper_every: the hypergradient is taken each ``hyper_every``-th step. Default: 1.
        bounds: boxes (low, high) of coefficients by name. The others keep theirs: b1 [0.01, 0.99], b2 [0.5, 0.999],
            b3 [0, 0.99], rho, c and gamma [0, 1].

    Returns:
        The transformation. ``optax.tree_utils.tree_get(state, "coefficients")`` reads the coefficients.

    Raises:
        ValueError: an argument is out of its range, or a name unknown.

    References:
        Ozkara et al., `MADA: Meta-Adaptive Optimizers through hyper-gradient Descent
        <https://arxiv.org/abs/2401.08893>`_, 2024

    >>> import jax.numpy as jnp
    >>> tx = mada(3e-4, b2=0.95, weight_decay=0.1)
    >>> state = tx.init({"w": jnp.ones(3)})
    >>> {name: round(float(q), 2) for name, q in optax.tree_utils.tree_get(state, "coefficients").items()}
    {'b1': 0.9, 'b2': 0.95, 'b3': 0.0, 'rho': 1.0, 'c': 1.0, 'gamma': 1.0}
    """
    return hypergradient_optimizer(
        mada_family(eps, lion_betas),
        learning_rate,
        weight_decay,
        mask,
        start={"b1": b1, "b2": b2, "b3": b3, "rho": rho, "c": c, "gamma": gamma},
        hyper_lr=hyper_lr,
        hyper_momentum=hyper_momentum,
        hyper_clip=hyper_clip,
        hyper_warmup=hyper_warmup,
        hyper_every=hyper_every,
        bounds=bounds,
    )


def avgrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 1e-2,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad with the maximum over past second moments replaced by their average (MADA, section 3.1).

    The direction is m̂_t / (√(v̄_t / (1-β2^t)) + ε) with v̄_t the mean of v_1, ..., v_t: :func:`mada` at ρ = 0, nothing
    learned.

    Args:
        learning_rate, b1, b2, eps, weight_decay, mask: as in :func:`mada`.

    Returns:
        The transformation.

    References:
        Ozkara et al., `MADA: Meta-Adaptive Optimizers through hyper-gradient Descent
        <https://arxiv.org/abs/2401.08893>`_, 2024

    >>> import jax.numpy as jnp
    >>> tx = avgrad(0.1, weight_decay=0.0)
    >>> updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    >>> updates.round(3)
    Array([-0.1, -0.1], dtype=float32)
    """
    return mada(learning_rate, b1, b2, eps, weight_decay, mask, rho=0.0, hyper_lr=0.0)
