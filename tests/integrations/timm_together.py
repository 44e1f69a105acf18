"""Trains a CLATTask in as many processes as ``torchrun`` starts: ``timm_together.py FOLDER``."""

import os
import sys
from pathlib import Path

import timm
import torch
from torch import distributed

import toughen as tg
from toughen import processes
from toughen.integrations.timm import CLATTask

PGD = tg.PGD(tg.ThreatModel(norm="linf", eps=8 / 255), step_size=2 / 255, steps=2)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 3, 8, 8, generator=draw), torch.randint(4, (16,), generator=draw)) for _ in range(4)]


def make_task(method: object = None, **settings: object) -> CLATTask:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    return CLATTask(model, method=method or tg.CLAT(k=1, every=1, select="random"), attack=PGD, **settings)


def train(task: CLATTask, optimizer: torch.optim.Optimizer, *, start: int = 0, epochs: int = 4) -> None:
    """As timm's train script does, with the rows of each batch that are this process's."""
    rank, count = processes.rank(), processes.count()
    for epoch in range(start, epochs):
        task.get_trainable_module().train()
        task.epoch_start(epoch, probe=batches(), optimizer=optimizer)
        for x, y in batches():
            optimizer.zero_grad()
            task(x[rank::count], y[rank::count])["loss"].backward()
            optimizer.step()


def make_optimizer(task: CLATTask) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)


def main(folder: Path) -> None:
    task = make_task()
    optimizer = make_optimizer(task)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
        task.prepare_distributed(broadcast_buffers=True)
    train(task, optimizer)
    selected = {epoch: selection.layers for epoch, selection in task.guest.selections.items()}
    weights = task.get_trainable_module().state_dict()
    torch.save({"weights": weights, "selected": selected}, folder / f"{processes.rank()}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
