"""Layers that a framework unfreezes during the training, and gradients that it clips."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mada_optim import OMADA


class Transfer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.head(self.backbone(batch)) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> OMADA:
        return OMADA(self, lr=1e-2)


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_lightnings_finetuning(tmp_path: Path):
    module = Transfer()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = copy.deepcopy(module.backbone.state_dict())
    trainer.fit(module, DataLoader(torch.rand(12, 4), batch_size=4))
    (optimizer,) = trainer.optimizers
    names = {name for group in optimizer.param_groups if group["matrices"] for name in group["param_names"]}
    assert names == {"backbone.0.weight", "backbone.2.weight"}
    assert optimizer.param_groups[-1]["matrices"]  # to whose learning rate the callback attends
    assert not any(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_clips_gradients_in_mixed_precision(precision: Any):
    module = Transfer()
    optimizer = module.configure_optimizers()
    module.training_step(torch.ones(2, 4), 0).backward()
    MixedPrecision(precision, "cpu").clip_gradients(optimizer, 1e-3)
    total = torch.stack([param.grad.norm() for param in module.parameters() if param.grad is not None]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-2)
