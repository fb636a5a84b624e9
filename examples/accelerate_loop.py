"""A training loop with accelerate: accelerate launch examples/accelerate_loop.py, or python"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from characters import Characters, Model
from torch.utils.data import DataLoader

from mada_optim import MADA
from mada_optim.integrations import scalars


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, of two batches each")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)

    set_seed(0)
    data = Characters(args.data)
    batches = DataLoader(data, batch_size=8, shuffle=True)

    # --8<-- [start:loop]
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        log_with="tensorboard",
        project_dir=args.out,
    )
    accelerator.init_trackers("log")
    model = Model(len(data.vocabulary))
    optimizer = MADA(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    step = 0
    for inputs, targets in islice(chain.from_iterable(repeat(batches)), 2 * args.steps):
        with accelerator.accumulate(model):
            loss = model(inputs, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if step % args.log_every == 0:
                accelerator.log({"loss": loss.item(), **scalars(optimizer)}, step=step)
    accelerator.save_state(args.out / "state")
    accelerator.end_training()
    # --8<-- [end:loop]

    accelerator.print(f"loss {loss.item():.3f}, {scalars(optimizer)}")


if __name__ == "__main__":
    main()
