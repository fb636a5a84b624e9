"""Symbols of coefficients, scales and learning rates in texts and figures, and their values in short."""

from __future__ import annotations

from mada_optim.families import OMADAFamily

SYMBOLS = {
    **{coefficient.name: coefficient.label for coefficient in OMADAFamily.coefficients},
    **{"scale": "κ", "scale_all": "κ", "scale_matrices": "κ-matrices", "scale_rest": "κ-rest"},
}
SCALE = "scale_"
"""Begins the names of learned scales among the coefficients of a run."""
RATE = "lr"
"""The name of a learning rate in use. With several kinds of parameters, ``lr_KIND``."""


def is_rate(name: str) -> bool:
    """Whether a value is a learning rate in use."""
    return name == RATE or name.startswith(f"{RATE}_")


def is_logarithmic(name: str) -> bool:
    """Whether a value is positive and moves by factors: a learned scale or a learning rate.

    >>> is_logarithmic("scale_matrices"), is_logarithmic("lr"), is_logarithmic("rho")
    (True, True, False)
    """
    return name == "scale" or name.startswith(SCALE) or is_rate(name)


def label_of(name: str) -> str:
    """Return what stands beside the line of a value. The index of a parameter group, as in ``0/rho``, stays.

    >>> label_of("beta1"), label_of("0/rho"), label_of("lr_matrices"), label_of("lr"), label_of("momentum")
    ('β1', '0/ρ', 'matrices', 'lr', 'momentum')
    """
    index, slash, own_name = name.rpartition("/")
    if is_rate(own_name):
        return own_name.removeprefix(f"{RATE}_")
    return f"{index}{slash}{SYMBOLS.get(own_name, own_name)}"


def short(value: float) -> str:
    """A coefficient, in a form in which a small one is not 0.

    >>> short(0.9), short(0.0), short(0.000123)
    ('0.900', '0.000', '1.23e-04')
    """
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
