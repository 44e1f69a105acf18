"""What a user of Lightning has: images, a module, a trainer."""

from pathlib import Path

import lightning.pytorch as lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg

PGD = tg.PGD(tg.ThreatModel(norm="linf", eps=8 / 255), step_size=2 / 255, steps=2)


def images(count: int = 64) -> TensorDataset:
    """Images whose class is their bright quadrant."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(4, (count,), generator=draw)
    x = 0.4 * torch.rand(count, 3, 8, 8, generator=draw)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 0.5
    return TensorDataset(x, y)


class Classifier(lightning.LightningModule):
    """What a user has: a network, its training step, its optimizer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = tg.models.create("small_cnn", num_classes=4, width=4, seed=seed)
        self.own_steps = 0

    def training_step(self, batch, batch_idx):
        self.own_steps += 1
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val", F.cross_entropy(self.model(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def trainer(folder: Path, *callbacks: lightning.Callback, epochs: int = 3, **settings) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {**quiet, "default_root_dir": folder, "enable_checkpointing": False, "devices": 1}
    return lightning.Trainer(max_epochs=epochs, callbacks=[*callbacks], **{**defaults, **settings})


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(images(), batch_size=batch_size)
