import math
import warnings

import pytest
import torch

from small_runs import clat, train
from toughen.engine import TrainSettings
from toughen.errors import InputError

EPOCHS = 4  # of 3 steps each


def logged(folder, **sections):
    """The learning rate of the last step of each epoch, as the log tells it."""
    return [row["lr"] for row in train(folder, **sections).log()]


def shares():
    """How much of the run is done at the last step of each epoch."""
    return [(3 * epoch - 1) / (3 * EPOCHS) for epoch in range(1, EPOCHS + 1)]


def test_cosine_falls_from_lr_to_zero_along_half_a_wave(tmp_path):
    expected = [0.2 * (1 + math.cos(math.pi * share)) / 2 for share in shares()]
    found = logged(tmp_path / "run", train={"epochs": EPOCHS, "lr": 0.2, "schedule": "cosine"})
    assert found == pytest.approx(expected, abs=1e-12)


def test_piecewise_multiplies_by_gamma_at_each_milestone(tmp_path):
    settings = {"epochs": EPOCHS, "lr": 0.2, "schedule": "piecewise", "milestones": [0.5, 0.75], "gamma": 0.1}
    assert logged(tmp_path / "run", train=settings) == pytest.approx([0.2, 0.2, 0.02, 0.002])


def test_cyclic_climbs_to_lr_at_the_peak_and_comes_back_to_zero(tmp_path):
    settings = {"epochs": EPOCHS, "lr": 0.2, "schedule": "cyclic", "peak": 0.5}
    assert logged(tmp_path / "run", train=settings) == pytest.approx([0.2 / 3, 0.5 / 3, 0.4 / 3, 0.1 / 3])


def test_onecycle_is_that_of_torch():
    settings = TrainSettings(epochs=10, lr=0.2, schedule="onecycle", peak=0.3)
    steps = 40
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step of the optimizer comes before those of its schedule
        # torch's last rate is that of step `steps - 1`, and its peak lies one step before its share
        theirs = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=0.2,
            total_steps=steps + 1,
            pct_start=(0.3 * steps + 1) / (steps + 1),
            cycle_momentum=False,
        )
        for step in range(steps + 1):
            assert settings.lr_at(step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
            if step < steps:
                theirs.step()


def test_constant_stays(tmp_path):
    assert logged(tmp_path / "run", train={"epochs": EPOCHS, "lr": 0.2, "schedule": "constant"}) == [0.2] * EPOCHS


def test_the_schedule_moves_at_every_step_and_not_only_at_epochs():
    settings = TrainSettings(epochs=2, lr=1.0, schedule="cosine")
    rates = [settings.lr_at(step / 10) for step in range(11)]
    assert rates == sorted(set(rates), reverse=True)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((1.0, 0.5, 0.0))


def test_clat_scales_the_rate_from_its_first_epoch_on(tmp_path):
    plan = {"epochs": EPOCHS, "lr": 0.2, "schedule": "constant"}
    found = logged(tmp_path / "run", train=plan, **clat(start_epoch=2, lr_scale=0.25))
    assert found == pytest.approx([0.2, 0.2, 0.05, 0.05])


def test_clat_continues_the_schedule_unless_it_is_told_to_restart(tmp_path):
    plan = {"epochs": EPOCHS, "lr": 0.2, "schedule": "cosine"}
    plain = [0.2 * (1 + math.cos(math.pi * share)) / 2 for share in shares()]

    continued = logged(tmp_path / "continue", train=plan, **clat(start_epoch=2))
    restarted = logged(tmp_path / "restart", train=plan, **clat(start_epoch=2, lr="restart"))

    assert continued == pytest.approx(plain, abs=1e-12)
    # from epoch 2 on, the whole wave is laid over the two epochs that remain
    wave = [0.2 * (1 + math.cos(math.pi * share)) / 2 for share in (2 / 6, 5 / 6)]
    assert restarted == pytest.approx([*plain[:2], *wave], abs=1e-12)


def test_a_branch_goes_on_with_the_schedule_as_if_nothing_had_happened(tmp_path):
    plan = {"epochs": EPOCHS, "lr": 0.2, "schedule": "cosine"}
    run = train(tmp_path / "run", train=plan, branch_epoch=2, branches={"on": {}, "clat": clat()})
    expected = [0.2 * (1 + math.cos(math.pi * share)) / 2 for share in shares()]
    assert [row["lr"] for row in run.log()] == pytest.approx(expected[:2])
    for branch in run.branches():
        assert [row["lr"] for row in branch.log()] == pytest.approx(expected[2:], abs=1e-12)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("weight_decay", math.inf),
        ("momentum", -1.0),
        ("patience", 0),
        ("validate_every", 0),
        ("checkpoint_steps", 0),
        ("milestones", (0.5, 1.5)),
        ("peak", 0.0),
        ("seed", -1),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_name_and_value(setting, value):
    shown = str(list(value)) if isinstance(value, tuple) else str(value)
    with pytest.raises(InputError) as refused:
        TrainSettings(**{"epochs": 1, setting: value})
    assert setting in str(refused.value)
    assert shown in str(refused.value)
