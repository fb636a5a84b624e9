"""Lightning: python examples/lightning_trainer.py"""

from __future__ import annotations

import argparse
from pathlib import Path

from characters import Characters, Model
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from mada_optim import MADA
from mada_optim.integrations.lightning import LogCoefficients


# --8<-- [start:module]
class LanguageModel(LightningModule):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.model = Model(vocabulary)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.model(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> MADA:
        return MADA(self.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)


# --8<-- [end:module]


def main(argv: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args(argv)

    seed_everything(0, verbose=False)
    data = Characters(args.data)
    batches = DataLoader(data, batch_size=16, shuffle=True)

    # --8<-- [start:trainer]
    trainer = Trainer(
        max_steps=args.steps,
        log_every_n_steps=args.log_every,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(args.out),
        callbacks=[LogCoefficients()],
        accelerator=args.accelerator,
    )
    trainer.fit(LanguageModel(len(data.vocabulary)), batches, ckpt_path=args.resume)
    # --8<-- [end:trainer]

    print(trainer.logged_metrics)
    return trainer


if __name__ == "__main__":
    main()
