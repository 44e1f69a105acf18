import pytest

from small_runs import recipe, resume
from toughen.engine import Interrupted, Trainer, TrainSettings, checkpoint
from toughen.engine.auto_rate import halvings
from toughen.errors import InputError, Notice


def run_with(robust, folder, monkeypatch, **settings):
    """A run whose robust validation accuracies are given."""
    found = iter(robust)
    monkeypatch.setattr(
        "toughen.engine.trainer.validate", lambda *_: {"validation": {"clean": 0.9, "robust": next(found), "n": 20}}
    )
    return Trainer(recipe(train={"epochs": len(robust), "batch_size": 20, **settings}), out=folder).fit()


def test_a_collapse_ends_the_run_as_it_was_at_the_validation_before(tmp_path, monkeypatch, capsys):
    run = run_with([0.3, 0.5, 0.2, 0.6], tmp_path / "run", monkeypatch, max_drop=0.25)
    assert checkpoint.read_state(run.checkpoints / "last")["epoch"] == 2
    assert [row["epoch"] for row in run.log()] == [1, 2, 3]
    assert run.log()[-1]["ended"] == "robust validation accuracy fell by more than train.max_drop=0.25"
    assert run.finished
    assert (
        "in epoch 3: catastrophic overfitting; the run ends with the checkpoint of epoch 2" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "robust"), [({"checkpoint_steps": 1}, [0.3, 0.5, 0.2, 0.6]), ({"validate_every": 2}, [0.5, 0.2])]
)
def test_a_collapse_takes_back_what_came_after_the_validation_before(tmp_path, monkeypatch, settings, robust):
    found = iter(robust)
    monkeypatch.setattr(
        "toughen.engine.trainer.validate", lambda *_: {"validation": {"clean": 0.9, "robust": next(found), "n": 20}}
    )
    section = {"epochs": 4, "batch_size": 20, "max_drop": 0.25, **settings}
    run = Trainer(recipe(train=section), out=tmp_path / "run").fit()
    last = checkpoint.read_state(run.checkpoints / "last")
    assert (last["epoch"], last["step"]) == (2, 0)
    weights = [(run.checkpoints / name / "weights.safetensors").read_bytes() for name in ("validated", "last")]
    assert weights[0] == weights[1]
    assert "ended" in run.log()[-1]


def test_a_collapsed_run_that_is_cut_before_its_evaluation_does_not_train_again(tmp_path, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("toughen.engine.trainer.evaluate_checkpoints", cut)
        with pytest.raises(Interrupted):
            run_with([0.3, 0.5, 0.2, 0.6], tmp_path / "run", patch, max_drop=0.25)
    seen = (tmp_path / "run" / "log.jsonl").read_text()
    run = resume(tmp_path / "run")
    assert run.finished
    assert (run.path / "log.jsonl").read_text() == seen
    assert checkpoint.read_state(run.checkpoints / "last")["epoch"] == 2


def test_a_smaller_drop_goes_on(tmp_path, monkeypatch):
    run = run_with([0.3, 0.5, 0.2, 0.6], tmp_path / "run", monkeypatch, max_drop=0.35)
    assert checkpoint.read_state(run.checkpoints / "last")["epoch"] == 4
    assert not any("collapse" in row for row in run.log())


def test_without_the_guard_a_collapse_is_named_and_the_run_goes_on(tmp_path, monkeypatch):
    with pytest.warns(
        Notice, match=r"run: robust validation accuracy fell from 0\.500 to 0\.200 in epoch 3: catastroph"
    ):
        run = run_with([0.3, 0.5, 0.2, 0.6], tmp_path / "run", monkeypatch)
    assert checkpoint.read_state(run.checkpoints / "last")["epoch"] == 4
    assert ["collapse" in row for row in run.log()] == [False, False, True, False]


@pytest.mark.parametrize("robust", [[0.5, 0.29, 0.6], [0.3, 0.12, 0.6]], ids=["more than half stays", "a small fall"])
def test_an_ordinary_fall_is_no_collapse(tmp_path, monkeypatch, robust):
    assert not any("collapse" in row for row in run_with(robust, tmp_path / "run", monkeypatch).log())


@pytest.mark.parametrize("drop", [0.0, 1.0, 20.0])
def test_a_drop_that_is_no_share_is_refused(drop):
    with pytest.raises(InputError, match=rf"train.max_drop is {drop}; it must lie between 0 and 1"):
        TrainSettings(epochs=1, max_drop=drop)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(InputError, match=r"train\.nesterov needs optimizer='sgd' and a momentum above 0"):
        TrainSettings(epochs=1, nesterov=True, momentum=0.0)


def test_the_automatic_schedule_halves_the_rate_and_goes_on_from_the_best_weights(tmp_path, monkeypatch):
    settings = {"schedule": "auto", "lr": 0.1, "max_drop": None}
    robust = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1]  # best after epoch 2; a decision after epoch 2, 3 and later
    run = run_with(robust, tmp_path / "run", monkeypatch, **settings)
    halved = halvings(robust, len(robust))
    rates = [row["lr"] for row in run.log()]
    assert halved[0] == 3
    assert rates == [0.1 * 0.5 ** sum(place < epoch for place in halved) for epoch in range(1, 7)]
    shorter = run_with(robust[:3], tmp_path / "again", monkeypatch, **{**settings, "epochs": 6, "patience": 1})
    best, last = (checkpoint.read_state(shorter.checkpoints / name)["epoch"] for name in ("best", "last"))
    assert (best, last) == (2, 3)
    weights = [(shorter.checkpoints / name / "weights.safetensors").read_bytes() for name in ("best", "last")]
    assert weights[0] == weights[1]


def test_the_automatic_schedule_needs_a_validation_after_every_epoch():
    with pytest.raises(InputError, match=r"looks at every epoch's validation, but validate_every is 2; set it to 1"):
        TrainSettings(epochs=4, schedule="auto", validate_every=2)


def test_a_method_that_never_begins_is_told(tmp_path):
    wanted = recipe(method=[{"name": "pgd-at"}, {"name": "swa", "start_epoch": 2}], train={"epochs": 2})
    with pytest.warns(Notice, match=r"SWA never begins: its start_epoch is 2, and train\.epochs 2"):
        Trainer(wanted, out=tmp_path / "run")
