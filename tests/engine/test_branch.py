"""What a branch takes over from its run: weights, momentum, the schedule, and the state of the methods they share."""

import pytest
import torch

from small_runs import PGD_AT, recipe, train
from toughen.engine import Trainer, checkpoint
from toughen.engine.auto_rate import halvings
from toughen.engine.branch import num_shared
from toughen.errors import InputError

CLAT = {"name": "clat", "k": 1, "base": "inner", "lam": 0}
LORA = {"name": "lora", "rank": 2}
STILL = {"lr": 0.0}


def live_states(folder, methods, further, **sections):
    """The state of the methods at the end of a run, and of a branch that trains at rate 0 with others on top."""
    branches = {"on": {"method": [*methods, *further], "train": STILL}}
    run = train(folder / "run", method=methods, branch_epoch=1, branches=branches, **sections)
    states = [checkpoint.read_state(member.checkpoints / "last") for member in (run, run.branch("on"))]
    return states[0]["live"], states[1]["live"]


def test_the_methods_that_two_stacks_share_are_the_inner_ones_that_are_the_same():
    assert num_shared([PGD_AT, LORA], [PGD_AT, LORA, CLAT]) == 2
    assert num_shared([PGD_AT, LORA], [PGD_AT, {**LORA, "rank": 4}]) == 1
    assert num_shared([PGD_AT], [{"name": "trades"}, PGD_AT]) == 0


def test_adapters_beside_the_network_go_on_under_clat(tmp_path):
    run, branch = live_states(tmp_path, [{"name": "autolora", "rank": 2}], [CLAT])
    for name, factor in run["adapters"].items():
        torch.testing.assert_close(branch["inner"]["adapters"][name], factor, rtol=0, atol=0)
        assert factor.abs().sum() > 0


def test_the_frozen_net_of_twins_stays_that_of_the_start_of_the_run_under_clat(tmp_path):
    network = {"name": "resnet18", "width": 2}
    run, branch = live_states(tmp_path, [PGD_AT, {"name": "twins"}], [CLAT], model=network)
    frozen = [name for name in run["frozen_net"] if name.endswith("running_mean")]
    assert frozen
    for name in frozen:
        assert not run["frozen_net"][name].any()  # as initialised
        assert not branch["inner"]["frozen_net"][name].any()


def test_adapters_inside_the_network_go_on_under_clat(tmp_path):
    branches = {"on": {"method": [PGD_AT, LORA, CLAT], "train": STILL}}
    run = train(tmp_path / "run", method=[PGD_AT, LORA], branch_epoch=1, branches=branches)
    before, after = (checkpoint.read_state(m.checkpoints / "last")["training"] for m in (run, run.branch("on")))
    for name in [name for name, p in before.items() if p.is_floating_point()]:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
    assert len(before) > len(list(Trainer(run_recipe(), out=tmp_path / "plain").model.state_dict()))


def run_recipe():
    return recipe(train={"epochs": 1})


def test_a_branch_with_adapters_of_another_rank_begins_without_their_momentum(tmp_path):
    run = train(
        tmp_path / "run",
        method=[PGD_AT, LORA],
        branch_epoch=1,
        branches={"wider": {"method": [PGD_AT, {**LORA, "rank": 4}]}},
    )
    assert len(run.branch("wider").log()) == 1


def test_the_automatic_rate_of_a_branch_goes_on_where_that_of_its_run_was(tmp_path, monkeypatch):
    robust = [0.5, 0.4, 0.3, 0.35, 0.36, 0.3]
    found = iter(robust)
    monkeypatch.setattr(
        "toughen.engine.trainer.validate", lambda *_: {"validation": {"clean": 0.9, "robust": next(found), "n": 20}}
    )
    run = train(
        tmp_path / "run",
        train={"epochs": 6, "schedule": "auto", "lr": 0.1},
        branch_epoch=3,
        branches={"on": {}},
    )
    rates = [row["lr"] for member in (run, run.branch("on")) for row in member.log()]
    halved = halvings(robust, 6)
    assert halved[0] <= 3  # in the run already
    assert rates == [0.1 * 0.5 ** sum(place < epoch for place in halved) for epoch in range(1, 7)]


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ({"train": {"batch_size": 999}}, r"batch_size is 999; with 60 images it must be 1\.\.60"),
        ({"method": [PGD_AT, {"name": "carry-over"}]}, r"augmentation idbh_weak changes or blends pixels"),
    ],
)
def test_a_branch_whose_batches_cannot_be_made_is_refused_before_its_run_trains(tmp_path, branch, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", data={"augment": [{"name": "idbh_weak"}]}, branch_epoch=1, branches={"b": branch})
    assert not (tmp_path / "run").exists()
