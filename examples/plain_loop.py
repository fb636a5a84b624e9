"""A training loop in plain PyTorch: python examples/plain_loop.py"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from characters import Characters, Model
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from mada_optim import MADA
from mada_optim.integrations import scalars


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/plain"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    data = Characters(args.data)
    model = Model(len(data.vocabulary))
    batches = DataLoader(data, batch_size=16, shuffle=True)

    # --8<-- [start:loop]
    optimizer = MADA(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps, cycle_momentum=False)
    with SummaryWriter(str(args.out)) as board:
        epochs = chain.from_iterable(repeat(batches))
        for step, (inputs, targets) in enumerate(islice(epochs, args.steps), start=1):
            loss = model(inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % args.log_every == 0:
                for name, value in {"loss": loss.item(), **scalars(optimizer)}.items():
                    board.add_scalar(name, value, step)
    # --8<-- [end:loop]

    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(checkpoint, args.out / "checkpoint.pt")
    print(f"loss {loss.item():.3f}, {optimizer.coefficients()}")


if __name__ == "__main__":
    main()
