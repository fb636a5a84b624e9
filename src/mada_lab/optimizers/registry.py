"""The optimizers that experiments know by name: ours, torch's as the baseline, and what else people use.

A new one has its entry here, and a constructor in ``peers.py`` where it takes more than a class of a package.
This module needs torch alone, so that ``mada optimizers`` lists them wherever mada-optim is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import Optimizer

import mada_optim
from mada_lab.errors import InputError
from mada_lab.optimizers.peers import MechanicWithAdamW, MuonWithAdamW, imported
from mada_lab.optimizers.variants import MaximumMADA, ZeroedGradientMADA, searching_omada

LR = 3e-3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Entry:
    """What experiments know of an optimizer.

    Args:
        description: for people.
        make: constructor; None: ``mada_optim.load_optimizer`` of the name.
        takes_matrices: its parameter groups say which parameters are matrices.
        own_betas: (0.9, 0.99) would mean something else to it than to Adam.
        lr: learning rate where the user gives none.
        weight_decay: where the user gives none.
        final_lr: share of the learning rate at the end of a run, where the user gives none.
        package: that it needs beside torch, by the name under which it is imported.
        timed_as: its name in ``mada bench``; None: it is not timed, or in settings of its own.
    """

    description: str
    make: Callable[..., Optimizer] | None = None
    takes_matrices: bool = False
    own_betas: bool = False
    lr: float = LR
    weight_decay: float = WEIGHT_DECAY
    final_lr: float = 0.1
    package: str | None = None
    timed_as: str | None = None


# The baseline must be what people use, not our reformulation of it, and as fast as it comes.
ENTRIES: dict[str, Entry] = {
    "adam": Entry("Adam; adamw without weight decay", weight_decay=0.0),
    "adamw": Entry("torch.optim.AdamW, fused: the baseline", partial(torch.optim.AdamW, fused=True)),
    "adan": Entry("Adan: momentum of gradient differences", own_betas=True),
    "amsgrad": Entry("torch.optim.AdamW(amsgrad=True), fused", partial(torch.optim.AdamW, fused=True, amsgrad=True)),
    "avgrad": Entry("AMSGrad with the average in place of the maximum"),
    # Defazio and Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023.
    "dadaptation": Entry(
        "D-Adaptation's AdamW (dadaptation): finds its step size, which lr multiplies",
        imported("dadaptation.DAdaptAdam", decouple=True),
        lr=1.0,
        package="dadaptation",
    ),
    # Ivgi, Hinder and Carmon, 2023. Its authors validate an average of the weights, which is left out here.
    "dog": Entry(
        "DoG (dog-optimizer): SGD at a rate of distance over gradients, which lr multiplies",
        imported("dog.DoG"),
        own_betas=True,
        lr=1.0,
        weight_decay=0.0,  # it is not decoupled
        package="dog",
    ),
    "hyperadam": Entry("Adam that learns beta1 and beta2"),
    "lion": Entry("Lion: sign of a momentum; wants a 3 to 10 times smaller rate", own_betas=True, lr=1e-3),
    "mada": Entry("learns all coefficients but beta2, from Adam's point"),
    "mada-maximum": Entry("MADA with AMSGrad's maximum instead of AVGrad's average", MaximumMADA),
    "mada-paper": Entry("learns all six, with the authors' step sizes"),
    "mada-zeroed": Entry("MADA with the kept gradient zeroed, as the authors' code does", ZeroedGradientMADA),
    "mechanic": Entry(
        "Mechanic (mechanic-pytorch) around torch's AdamW: finds its step size, whatever lr is",
        MechanicWithAdamW,
        lr=1.0,
        package="mechanic_pytorch",
    ),
    "muon": Entry(
        "torch.optim.Muon for hidden matrices, torch's AdamW for the rest",
        MuonWithAdamW,
        takes_matrices=True,
        timed_as="Muon and AdamW (torch)",
    ),
    "omada": Entry(
        "Muon for hidden matrices, AdamW for the rest, at rates that it finds", mada_optim.OMADA, takes_matrices=True
    ),
    "omada-search": Entry("OMADA with another search for its rates", searching_omada, takes_matrices=True),
    # Mishchenko and Defazio, 2023, as its authors advise.
    "prodigy": Entry(
        "Prodigy (prodigyopt): finds its step size, which lr multiplies",
        imported("prodigyopt.Prodigy", use_bias_correction=True, safeguard_warmup=True),
        lr=1.0,
        package="prodigyopt",
    ),
    # Defazio et al., "The Road Less Scheduled", 2024.
    "schedulefree": Entry(
        "schedule-free AdamW (schedulefree), lr constant",
        imported("schedulefree.AdamWScheduleFree"),
        final_lr=1.0,
        package="schedulefree",
        timed_as="schedule-free AdamW",
    ),
    "yogi": Entry("Yogi: additive second moment"),
}
# Presets of the library that need no word of their own are known by the first line of their docstrings.
ENTRIES |= {
    name: Entry(str(mada_optim.load_optimizer(name).__doc__).partition("\n")[0])
    for name in mada_optim.available_optimizers()
    if name not in ENTRIES
}


def find(name: str) -> Entry:
    """Return the entry of an optimizer. Raises :class:`InputError` where there is none of that name."""
    if name not in ENTRIES:
        raise InputError(f"optimizer must be one of {', '.join(ENTRIES)}, got {name!r}")
    return ENTRIES[name]
