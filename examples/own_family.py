"""A family of one's own, SGD that learns its momentum: python examples/own_family.py"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from characters import Characters, Model
from torch import Tensor
from torch.utils.data import DataLoader

from mada_optim import Coefficient, Family, HypergradientOptimizer, is_frozen_at


# --8<-- [start:family]
class NesterovSGD(Family):
    """SGD with a learned momentum and a learned blend of heavy ball (0) and Nesterov (1)."""

    coefficients = (
        Coefficient(
            "momentum",
            0.9,
            box=(0.0, 0.99),
            hyper_lr=0.1,
            domain=(0.0, 1.0),
            frozen_at=(0.0,),
        ),
        Coefficient("nesterov", 0.0, box=(0.0, 1.0), hyper_lr=0.1, domain=(0.0, 1.0)),
    )

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        return () if is_frozen_at(q["momentum"], 0.0) else ("velocity",)

    def update(
        self, state: Mapping[str, Tensor], grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if is_frozen_at(q["momentum"], 0.0):
            return grad, {}
        velocity = q["momentum"] * state["velocity"] + grad
        lookahead = grad + q["momentum"] * velocity
        return (1 - q["nesterov"]) * velocity + q["nesterov"] * lookahead, {"velocity": velocity}


# --8<-- [end:family]


def main(argv: list[str] | None = None) -> HypergradientOptimizer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    data = Characters(args.data)
    model = Model(len(data.vocabulary))

    # --8<-- [start:use]
    optimizer = HypergradientOptimizer(
        model.parameters(), NesterovSGD(), lr=0.3, start={"momentum": 0.0}, hyper_warmup=10
    )
    epochs = chain.from_iterable(repeat(DataLoader(data, batch_size=16, shuffle=True)))
    for inputs, targets in islice(epochs, args.steps):
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}, {optimizer.coefficients()}")
    # --8<-- [end:use]
    return optimizer


if __name__ == "__main__":
    main()
