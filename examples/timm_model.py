"""Any network of timm: measure, then tune the critical layers. ``python examples/timm_model.py [NAME]``."""

import sys

import torch

import toughen as tg


def main(name: str = "test_resnet", epochs: int = 6) -> float:
    """Train PGD-AT, then CLAT on the most critical layer; return the robust accuracy."""
    digits = tg.data.load(tg.data.DataSettings(name="digits", validation=200))
    batches = list(tg.data.in_order(digits.train, batch_size=64, device="cpu"))
    # pretrained=True for published weights, with the normalisation that belongs to them; it is inside either way
    model = tg.models.create(f"timm/{name}", num_classes=10, in_channels=1, seed=0)

    threat = tg.ThreatModel(norm="linf", eps=0.1)
    pgd = tg.PGD(threat, step_size=0.025, steps=5)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=epochs - 2, base="inner", lam=0)).bind(model, attack=pgd)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        model.train()
        if selection := method.epoch_start(epoch, probe=batches[:2], optimizer=optimizer):
            print(selection.report)
            print(f"from epoch {epoch} on: {', '.join(selection.layers)}")
        for x, y, *_ in batches:
            optimizer.zero_grad()
            method(x, y).loss.backward()
            optimizer.step()
            method.step_end()

    test = tg.data.in_order(digits.test, batch_size=200, device="cpu")
    found = tg.evaluate(method.deployed(), test, [tg.parse_attack("pgd-20", threat=threat, step_size=0.025)])
    print(f"accuracy under PGD-20: {found['pgd-20'].accuracy:.3f}")
    return found["pgd-20"].accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
