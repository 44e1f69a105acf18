"""Updates whose gradient is not finite: left out on the device, told, and handled as the settings say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from small_runs import outcome, recipe, train
from toughen import Trainer, data
from toughen.engine import Recipe, create_model, faults
from toughen.engine.update import Updater
from toughen.errors import InputError
from toughen.run_folder import RunFolder
from toughen.types import Batch

SPOILED_STEPS = pytest.mark.parametrize("optimizer", [{}, {"optimizer": "adamw", "lr": 0.001}, {"momentum": 0.0}])


def trainer(wanted: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch, spoils: Callable[[int], bool]) -> Trainer:
    """A run of which some updates, counted from 0, meet images without a number."""
    made, update = 0, Updater.update

    def spoiled(self: Updater, batch: Batch, *place: int) -> dict[str, Tensor]:
        nonlocal made
        made += 1
        return update(self, batch._replace(x=batch.x * torch.nan) if spoils(made - 1) else batch, *place)

    monkeypatch.setattr(Updater, "update", spoiled)
    return Trainer(wanted, out=folder)


@SPOILED_STEPS
def test_a_spoiled_update_changes_nothing_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any]
) -> None:
    sections = {"train": {"epochs": 1, "nonfinite": "skip", "schedule": "constant", **optimizer}}
    states: list[list[Tensor]] = []
    update = Updater.update

    def watched(self: Updater, batch: Batch, *place: int) -> dict[str, Tensor]:
        out = update(self, batch, *place)
        kept = [t for p in self.live.parameters() for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
        states.append([t.detach().clone() for t in (*self.live.parameters(), *kept)])
        return out

    monkeypatch.setattr(Updater, "update", watched)
    run = trainer(recipe(**sections), tmp_path / "run", monkeypatch, lambda number: number == 1).fit()

    first, spoiled, last = states
    assert all(torch.equal(a, b) for a, b in zip(first, spoiled, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(spoiled, last, strict=True) if a.dim() > 1)
    [row] = run.log()
    assert row["skipped_updates"] == 1
    assert all(torch.isfinite(torch.tensor(value)) for value in (row["gradient_norm"], *row["losses"].values()))


def test_a_first_update_that_is_spoiled_leaves_no_trace_in_the_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"train": {"epochs": 1, "nonfinite": "skip"}}
    with monkeypatch.context() as patch:
        run = trainer(recipe(**sections), tmp_path / "run", patch, lambda number: number == 0).fit()
    weights = load_file(run.checkpoints / "last" / "weights.safetensors")
    assert run.log()[0]["skipped_updates"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_the_batch_is_kept_for_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(train={"epochs": 2})
    with pytest.raises(InputError, match=r"epoch 2, step 2 \(1 updates left out.*nonfinite=skip.*is kept in .*faults"):
        trainer(wanted, tmp_path / "run", monkeypatch, lambda number: number == 4).fit()

    kept = load_file(tmp_path / "run" / "faults" / "epoch_0001_step_000001.safetensors")
    again = Trainer(wanted, out=tmp_path / "again")
    batch = next(iter(again.loader.epoch(1, start_step=1)))
    assert torch.equal(kept["x"], batch.x)
    assert torch.equal(kept["y"], batch.y)
    assert torch.equal(kept["index"], batch.index)  # type: ignore[arg-type]


def test_a_run_that_skips_stops_where_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(train={"epochs": 3, "nonfinite": "skip"})
    with pytest.raises(InputError, match=r"epoch 2, step 1 \(3 updates left out"):
        trainer(wanted, tmp_path / "run", monkeypatch, lambda number: number >= 3).fit()
    assert len(RunFolder(tmp_path / "run").log()) == 1


def test_the_device_is_looked_at_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toughen.engine.trainer.LOOK_EVERY", 2)
    looked = []
    look = faults.FaultWatch.look
    monkeypatch.setattr(
        faults.FaultWatch, "look", lambda self, *a, **k: looked.append(k["step"]) or look(self, *a, **k)
    )
    train(tmp_path / "run", train={"epochs": 1, "batch_size": 10})
    assert looked == [2, 4, 6, 6]


def test_without_faults_both_policies_train_alike(tmp_path: Path) -> None:
    stops, skips = (train(tmp_path / policy, train={"nonfinite": policy}) for policy in ("stop", "skip"))
    assert outcome(stops) == outcome(skips)


def test_a_spoiled_network_is_named_at_the_first_look(tmp_path: Path) -> None:
    wanted = recipe()
    model = create_model(wanted.model, data.load(wanted.data), seed=0)
    with torch.no_grad():
        nn.utils.parameters_to_vector(model.parameters())
        next(model.parameters()).fill_(torch.inf)
    with pytest.raises(InputError, match="the gradient is not finite in epoch 1, step 1"):
        Trainer(wanted, out=tmp_path / "run", model=model).fit()
