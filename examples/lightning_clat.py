"""CLAT in Lightning's Trainer: ``python examples/lightning_clat.py`` (needs ``pip install 'toughen[lightning]'``)."""

import lightning.pytorch as lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import toughen as tg
from toughen.integrations.lightning import CLATCallback


class Classifier(lightning.LightningModule):
    """A module as anybody has it; nothing in it knows of CLAT."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tg.models.create("small_cnn", num_classes=10, in_channels=1, seed=0)  # normalises inside

    def training_step(self, batch, batch_idx):
        """Return the loss that the callback replaces."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        """Hold all parameters; the callback says which of them train."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)


def main(epochs: int = 4) -> float:
    """Train PGD-AT, then CLAT on the most critical layer; return the robust accuracy."""
    digits = tg.data.load(tg.data.DataSettings(name="digits", validation=200))
    (train,) = tg.data.in_order(digits.train, batch_size=len(digits.train), device="cpu")
    loader = DataLoader(TensorDataset(train.x, train.y), batch_size=64, shuffle=True)

    threat = tg.ThreatModel(norm="linf", eps=0.1)
    pgd = tg.PGD(threat, step_size=0.025, steps=5)
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=epochs // 2))
    clat = CLATCallback(method, attack=pgd)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[clat], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), loader)

    for epoch, selection in clat.selections.items():
        print(f"from epoch {epoch} on: {', '.join(selection.layers)}")
    test = tg.data.in_order(digits.test, batch_size=200, device="cpu")
    found = tg.evaluate(clat.deployed(), test, [tg.parse_attack("pgd-20", threat=threat, step_size=0.025)])
    print(f"accuracy under PGD-20: {found['pgd-20'].accuracy:.3f}")
    return found["pgd-20"].accuracy


if __name__ == "__main__":
    main()
