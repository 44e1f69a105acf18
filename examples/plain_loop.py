"""CLAT in a plain PyTorch loop: four lines more than without. ``python examples/plain_loop.py``."""

import torch
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg


def main(epochs: int = 6) -> float:
    """Train PGD-AT, then CLAT on the most critical layer; return the robust accuracy."""
    digits = tg.data.load(tg.data.DataSettings(name="digits", validation=200))
    (train,) = tg.data.in_order(digits.train, batch_size=len(digits.train), device="cpu")
    loader = DataLoader(TensorDataset(train.x, train.y), batch_size=64, shuffle=True)
    probe = [(train.x[:100], train.y[:100])]

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, padding=1, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 16, 10),
    )
    threat = tg.ThreatModel(norm="linf", eps=0.1)
    pgd = tg.PGD(threat, step_size=0.025, steps=5)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=epochs - 2)).bind(model, attack=pgd)  # 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        model.train()
        if selection := method.epoch_start(epoch, probe, optimizer=optimizer):  # 2
            print(f"from epoch {epoch} on: layer {', '.join(selection.layers)}")
        for x, y in loader:
            loss = method(x, y).loss  # 3, in the place of cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.step_end()  # 4, for methods that average

    test = tg.data.in_order(digits.test, batch_size=200, device="cpu")
    found = tg.evaluate(method.deployed(), test, [tg.parse_attack("pgd-20", threat=threat, step_size=0.025)])
    print(f"accuracy under PGD-20: {found['pgd-20'].accuracy:.3f}")
    return found["pgd-20"].accuracy


if __name__ == "__main__":
    main()
