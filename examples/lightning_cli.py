"""Lightning's command line: python examples/lightning_cli.py fit --model.optimizer=mada_optim.OMADA"""

from __future__ import annotations

from characters import Characters, Model
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mada_optim import OMADA, matrix_groups


# --8<-- [start:module]
class LanguageModel(LightningModule):
    def __init__(self, optimizer: OptimizerCallable = OMADA) -> None:
        super().__init__()
        self.data = Characters()
        self.model = Model(len(self.data.vocabulary))
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> Optimizer:
        # The groups tell OMADA which parameters are matrices. Other optimizers pass over that.
        return self.make_optimizer(matrix_groups(self))

    # --8<-- [end:module]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.model(*batch)
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.data, batch_size=16, shuffle=True)


def main(arguments: list[str] | None = None) -> LightningCLI:
    return LightningCLI(LanguageModel, args=arguments)


if __name__ == "__main__":
    main()
