"""`train.logger`: the numbers of each epoch, where their user watches them; trouble there never costs a run."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from small_runs import clat, recipe, resume, train
from toughen import Trainer
from toughen.engine import Interrupted
from toughen.errors import InputError, Notice

BRANCHED = {"branch_epoch": 1, "branches": {"clat": clat()}}


class Service(ModuleType):
    """A tracker that speaks W&B's language, and keeps what it is told."""

    def __init__(self, *, refuses: str = "", fails_at: int = 10**6) -> None:
        super().__init__("wandb")
        self.refuses, self.fails_at = refuses, fails_at
        self.told: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> "Service":
        if self.refuses:
            raise PermissionError(self.refuses)
        self.told.append(("init", options))
        return self

    def log(self, numbers: dict[str, float]) -> None:
        if len(self.told) >= self.fails_at:
            raise ConnectionError("gone\nfor good")
        self.told.append(("log", numbers))

    def finish(self) -> None:
        self.told.append(("finish", None))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_tensorboard_is_given_each_epoch_the_criticality_and_the_test_accuracy(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tmp_path / "run", train={"epochs": 2, "logger": "tensorboard"}, **clat())

    seen = events.EventAccumulator(str(run.path / "tensorboard"))
    seen.Reload()
    for name in ("losses/loss", "lr", "gradient_norm"):
        part, _, rest = name.partition("/")
        values = [row[part][rest] if rest else row[part] for row in run.log()]
        assert [(event.step, event.value) for event in seen.Scalars(name)] == [
            (epoch, pytest.approx(value)) for epoch, value in enumerate(values, start=1)
        ]
    [critical] = run.reports().values()
    for row in critical["layers"]:
        if row["criticality"] is not None:
            assert seen.Scalars(f"criticality/{row['name']}")[0].value == pytest.approx(row["criticality"])
    tested = run.evaluations("last")["pgd-2"]["accuracy"]
    assert seen.Scalars("test/last/pgd-2")[0].value == pytest.approx(tested)


def test_run_and_branch_have_a_record_each_one_after_the_other(tmp_path: Path, service: Service) -> None:
    run = train(tmp_path / "run", train={"epochs": 2, "logger": "wandb"}, **BRANCHED)
    kinds = [kind for kind, _ in service.told]
    first_end = kinds.index("finish")
    assert kinds[0] == kinds[first_end + 1] == "init"
    assert kinds[-1] == "finish"
    begun = [content for kind, content in service.told if kind == "init"]
    assert [record["name"] for record in begun] == ["run", "run/clat"]
    assert len({record["id"] for record in begun}) == 2
    assert begun[0]["config"] == run.config()
    epochs = [content for kind, content in service.told if kind == "log" and "losses/loss" in content]
    logged = [*run.log(), *run.branch("clat").log()]
    assert [(row["epoch"], row["losses/loss"]) for row in epochs] == [
        (row["epoch"], row["losses"]["loss"]) for row in logged
    ]


def test_a_resumed_run_goes_on_in_its_record(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("toughen.engine.trainer.evaluate_checkpoints", cut)
        with pytest.raises(Interrupted):
            train(tmp_path / "run", train={"logger": "wandb"})
    resume(tmp_path / "run")
    begun = [content for kind, content in service.told if kind == "init"]
    assert len(begun) == 2
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["resume"] == "allow"


def test_a_service_that_goes_away_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(fails_at=2))
    with pytest.warns(Notice, match=r"train.logger=wandb failed after epoch 2 \(gone\); the run goes on without"):
        run = train(tmp_path / "run", train={"epochs": 3, "logger": "wandb"})
    assert len(run.log()) == 3


def test_a_service_that_refuses_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(refuses="nobody is logged in"))
    with pytest.raises(
        InputError, match=r"train.logger=wandb can't begin \(nobody is logged in\).*--resume .*run"
    ) as told:
        train(tmp_path / "run", train={"logger": "wandb"})
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "wandb", Service())
    assert resume(tmp_path / "run").finished


def test_a_package_that_is_missing_is_told_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"train.logger=trackio .*pip install 'toughen\[trackio\]'"):
        Trainer(recipe(train={"logger": "trackio"}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")  # theirs are not ours
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_the_real_package_keeps_a_run_and_its_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for variable, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(variable, value)
    run = train(tmp_path / "run", train={"epochs": 2, "logger": name}, **BRANCHED)
    assert run.finished
