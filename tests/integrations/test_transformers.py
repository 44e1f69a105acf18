"""CLAT and its peers in the Hugging Face Trainer."""

import copy

import pytest
import torch

import toughen as tg

transformers = pytest.importorskip("transformers", reason="transformers is not installed: toughen[transformers]")
pytest.importorskip("accelerate", reason="accelerate is not installed: toughen[transformers]")

from toughen.integrations.transformers import CLATTrainer, ImageClassifier  # noqa: E402

PGD = tg.PGD(tg.ThreatModel(norm="linf", eps=8 / 255), step_size=2 / 255, steps=2)


def classifier() -> ImageClassifier:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    torch.manual_seed(0)
    return ImageClassifier(transformers.ViTForImageClassification(config), mean=(0.5,) * 3, std=(0.5,) * 3)


def rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(count, 3, 8, 8, generator=draw), torch.randint(4, (count,), generator=draw)
    return [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]


def trainer(folder, method, *, epochs: float = 2, **settings) -> CLATTrainer:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1000}
    chosen = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "weight_decay": 0.1, "num_train_epochs": epochs}
    args = transformers.TrainingArguments(output_dir=str(folder), **{**quiet, **chosen, **settings})
    return CLATTrainer(classifier(), args, method=method, attack=PGD, train_dataset=rows(), eval_dataset=rows(16))


def test_clat_moves_only_the_layers_that_it_selected(tmp_path):
    ours = trainer(tmp_path, tg.CLAT(k=1, every=1, select="random"))
    before = copy.deepcopy(ours.model.state_dict())

    ours.train()

    assert list(ours.selections) == [0, 1]
    layers = {layer for selection in ours.selections.values() for layer in selection.layers}
    moved = {name for name, value in ours.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in ours.model.parameters())


def test_evaluation_is_the_trainers_own_and_sees_logits(tmp_path):
    ours = trainer(tmp_path, tg.PGDAT(), epochs=1)
    ours.compute_metrics = lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()}
    ours.train()

    metrics = ours.evaluate()

    x = torch.stack([row["pixel_values"] for row in rows(16)])
    y = torch.stack([row["labels"] for row in rows(16)])
    right = (ours.deployed().eval()(x).argmax(1) == y).double().mean()
    assert metrics["eval_accuracy"] == pytest.approx(float(right))


def test_a_resumed_training_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    def end(folder, **settings) -> dict[str, torch.Tensor]:
        resume = settings.pop("resume", None)
        method = tg.stack(tg.PGDAT(), tg.CLAT(k=1, start_epoch=1, every=1, select="random"), tg.EMA())
        ours = trainer(folder, method, epochs=3, save_strategy="steps", save_steps=4, **settings)
        ours.train(resume_from_checkpoint=resume)
        return {**ours.model.state_dict(), **{f"ema.{n}": v for n, v in ours.deployed().state_dict().items()}}

    whole = end(tmp_path / "whole")
    resumed = end(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))  # inside the second epoch

    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_checkpoint_of_another_trainer_is_refused_in_one_line(tmp_path):
    ours = trainer(tmp_path, tg.PGDAT(), epochs=1, save_strategy="epoch")
    ours.train()
    (tmp_path / "checkpoint-3" / "method.pt").unlink()

    with pytest.raises(tg.InputError, match=r"checkpoint-3 has no method\.pt: it was not written by CLATTrainer"):
        trainer(tmp_path, tg.PGDAT(), epochs=2).train(resume_from_checkpoint=True)


def test_images_that_the_processor_has_normalised_are_refused(tmp_path):
    ours = trainer(tmp_path, tg.PGDAT())
    ours.train_dataset = [{**row, "pixel_values": (row["pixel_values"] - 0.5) / 0.5} for row in rows()]

    with pytest.raises(tg.InputError, match="normalisation"):
        ours.train()


def test_a_method_that_needs_more_of_a_loop_is_refused(tmp_path):
    with pytest.raises(tg.InputError, match="uses each batch several times, and the Trainer knows nothing of it"):
        trainer(tmp_path, tg.FreeAT(replays=3)).train()


def test_criticality_of_a_network_of_transformers_can_be_measured():
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])

    report = tg.analyze(classifier(), [(x, y)], attack=PGD)

    assert report.top(1)[0].name.startswith("net.vit.")
