"""Trains CLAT under Lightning's DDP in as many processes as ``torchrun`` starts: ``lightning_together.py FOLDER``."""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as lightning
import torch
from lightning_module import PGD, Classifier, images, trainer
from torch.utils.data import DataLoader, DistributedSampler

import toughen as tg
from toughen.integrations.lightning import CLATCallback


class Watches(lightning.Callback):
    """Looks at which gradients there are, and how many DDPs exchange them."""

    def __init__(self) -> None:
        self.trained: list[list[str]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        with_gradient = [name for name, p in pl_module.model.named_parameters() if p.grad is not None]
        if not self.trained or self.trained[-1] != with_gradient:
            self.trained.append(with_gradient)


def fit(folder: Path, count: int) -> None:
    rank = os.environ.get("RANK", "0")
    module, watches = Classifier(), Watches()
    clat = CLATCallback(tg.CLAT(k=1, every=1, select="random"), attack=PGD)
    settings = {"strategy": "ddp", "devices": count} if count > 1 else {}
    data = images()  # the rows of each batch in turn; Lightning's own sampler would shuffle them
    mine = DistributedSampler(data, count, int(rank), shuffle=False)
    batches = DataLoader(data, batch_size=16 // count, sampler=mine)
    trainer(folder, clat, watches, epochs=4, use_distributed_sampler=False, **settings).fit(module, batches)
    chosen = {epoch: selection.layers for epoch, selection in clat.selections.items()}
    torch.save({"weights": module.state_dict(), "selected": chosen, "trained": watches.trained}, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1")))
