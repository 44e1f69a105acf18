"""CLAT as a task of timm, in a loop like that of its train script: ``python examples/timm_task.py``."""

import timm
import torch
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg
from toughen.integrations.timm import CLATTask


def main(epochs: int = 6) -> float:
    """Train PGD-AT, then CLAT on the most critical layer; return the robust accuracy."""
    digits = tg.data.load(tg.data.DataSettings(name="digits", validation=200))
    (train,) = tg.data.in_order(digits.train, batch_size=len(digits.train), device="cpu")
    loader = DataLoader(TensorDataset(train.x, train.y), batch_size=64, shuffle=True)

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    threat = tg.ThreatModel(norm="linf", eps=0.1)
    pgd = tg.PGD(threat, step_size=0.025, steps=5)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=epochs - 2, base="inner", lam=0))
    task = CLATTask(model, method=method, attack=pgd, mean=(0.3,), std=(0.38,))  # in train.py: ClassificationTask(...)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        task.get_trainable_module().train()
        if selection := task.epoch_start(epoch, probe=loader, optimizer=optimizer):  # the line to add to train.py
            print(f"from epoch {epoch} on: {', '.join(selection.layers)}")
        for x, y in loader:
            optimizer.zero_grad()
            task(x, y)["loss"].backward()
            optimizer.step()

    test = tg.data.in_order(digits.test, batch_size=200, device="cpu")
    found = tg.evaluate(task.get_eval_model(), test, [tg.parse_attack("pgd-20", threat=threat, step_size=0.025)])
    print(f"accuracy under PGD-20: {found['pgd-20'].accuracy:.3f}")
    return found["pgd-20"].accuracy


if __name__ == "__main__":
    main()
