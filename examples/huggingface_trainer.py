"""CLAT in the Hugging Face Trainer: ``python examples/huggingface_trainer.py`` (extra ``toughen[transformers]``)."""

import tempfile

from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import toughen as tg
from toughen.integrations.transformers import CLATTrainer, ImageClassifier


def main(epochs: int = 14) -> float:
    """Train a small ViT with PGD-AT, then CLAT on its most critical layer; return the robust accuracy."""
    digits = tg.data.load(tg.data.DataSettings(name="digits", validation=200))
    (train,) = tg.data.in_order(digits.train, batch_size=len(digits.train), device="cpu")
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(train.x, train.y, strict=True)]

    set_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    # with a published model: ViTForImageClassification.from_pretrained(NAME, num_labels=10), and its processor's
    # image_mean and image_std here, and do_normalize=False there
    model = ImageClassifier(ViTForImageClassification(config), mean=(0.5,), std=(0.5,))

    threat = tg.ThreatModel(norm="linf", eps=0.05)
    pgd = tg.PGD(threat, step_size=0.0125, steps=3)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=epochs - 2, base="inner", lam=0))
    trainer = CLATTrainer(model, args, method=method, attack=pgd, train_dataset=rows)
    trainer.train()

    for epoch, selection in trainer.selections.items():
        print(f"from epoch {epoch} on: {', '.join(selection.layers)}")
    test = tg.data.in_order(digits.test, batch_size=200, device="cpu")
    found = tg.evaluate(trainer.deployed(), test, [tg.parse_attack("pgd-20", threat=threat, step_size=0.0125)])
    print(f"accuracy under PGD-20: {found['pgd-20'].accuracy:.3f}")
    return found["pgd-20"].accuracy


if __name__ == "__main__":
    main()
