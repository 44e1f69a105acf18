import json
import sys
from pathlib import Path

import pytest
import torch

from toughen import PGD, ThreatModel, processes
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, Journal, evaluate, parse_attack
from toughen.evaluation.autoattack import APGD, Square, TargetedAPGD, TargetedFAB
from zoo import images

THREAT = ThreatModel(eps=0.03)


def suite(stop_at: int | None = None, calls: list[int] | None = None) -> EvalAttack:
    """Three PGD stages; the call of this number is interrupted."""
    count = [] if calls is None else calls

    class Stopping(PGD):
        def __call__(self, *given, **options):
            if len(count) == stop_at:
                raise KeyboardInterrupt
            count.append(1)
            return super().__call__(*given, **options)

    return EvalAttack("suite", tuple((f"s{i}", Stopping(THREAT, step_size=0.007, steps=i + 1)) for i in range(3)))


@pytest.fixture(scope="module")
def victim():
    """A model of whose 17 images some fall in each stage, and some stand."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4)).eval()
    x, _ = images(17, seed=3)
    return model, [(x, model(x).argmax(dim=1))]


def test_some_images_fall_in_each_stage(victim):
    model, batches = victim
    result = evaluate(model, batches, [suite()], batch_size=5, sanity=False)["suite"]
    assert all(stage.fell > 0 for stage in result.stages)
    assert 0 < result.accuracy < 1


def without_time(file: Path) -> dict:
    content = json.loads(file.read_text())
    for stage in content["stages"]:
        stage.pop("seconds")
    del content["sha256"]  # of the seconds too
    return content


@pytest.mark.parametrize("stop_at", range(10))
def test_an_interrupted_evaluation_goes_on_to_the_same_file(tmp_path, victim, stop_at):
    model, batches = victim
    whole = Journal(tmp_path / "whole", {"weights": "w"})
    evaluate(model, batches, [suite()], batch_size=5, journal=whole)

    cut = Journal(tmp_path / "cut", {"weights": "w"})
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, batches, [suite(stop_at, calls)], batch_size=5, journal=cut)
    evaluate(model, batches, [suite(None, calls)], batch_size=5, journal=cut)
    assert without_time(tmp_path / "cut" / "suite.json") == without_time(tmp_path / "whole" / "suite.json")
    fresh: list[int] = []
    evaluate(model, batches, [suite(None, fresh)], batch_size=5)
    assert len(calls) == len(fresh)  # nothing was attacked twice


def small_autoattack() -> EvalAttack:
    """The stages of AutoAttack with a tenth of a hundredth of its budget."""
    return EvalAttack(
        "standard",
        (
            ("apgd-ce", APGD(threat=THREAT, steps=3)),
            ("apgd-t", TargetedAPGD(threat=THREAT, steps=3, targets=2)),
            ("fab-t", TargetedFAB(threat=THREAT, steps=3, targets=2)),
            ("square", Square(threat=THREAT, queries=20)),
        ),
    )


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_an_autoattack_that_is_cut_inside_a_chunk_goes_on_to_the_same_file(tmp_path, victim, share):
    model, batches = victim
    forwards = 0
    limit = float("inf")

    def count(*_):
        nonlocal forwards
        forwards += 1
        if forwards > limit:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(count)
    try:
        evaluate(model, batches, [small_autoattack()], batch_size=5, sanity=False, journal=Journal(tmp_path / "whole"))
        forwards, limit = 0, share * forwards
        cut = Journal(tmp_path / "cut")
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, batches, [small_autoattack()], batch_size=5, sanity=False, journal=cut)
        limit = float("inf")
        evaluate(model, batches, [small_autoattack()], batch_size=5, sanity=False, journal=cut)
    finally:
        handle.remove()
    assert without_time(tmp_path / "cut" / "standard.json") == without_time(tmp_path / "whole" / "standard.json")


@pytest.mark.parametrize("stop_at", range(8))
def test_a_point_that_is_no_worse_is_no_worse_after_an_interruption_either(tmp_path, stop_at):
    """The second stage moves pixels and leaves the loss as it is, whose digits JSON does not keep all."""

    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([1.1, 0.3, 0.2]) + 0 * x.flatten(1)[:, :3]

    class Moving(PGD):
        def __call__(self, model, x, y, *, generator):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(1)
            return (x + 0.01 * self.steps).clamp(0, 1)

    suite = EvalAttack("suite", tuple((f"by-{k}", Moving(THREAT, step_size=0.01, steps=k)) for k in (1, 2)))
    batches = [(torch.rand(17, 1, 2, 2), torch.zeros(17, dtype=torch.int64))]
    calls, limit = [], None
    evaluate(Constant(), batches, [suite], batch_size=5, sanity=False, journal=Journal(tmp_path / "whole"))
    calls, limit = [], stop_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(Constant(), batches, [suite], batch_size=5, sanity=False, journal=Journal(tmp_path / "cut"))
    limit = None
    evaluate(Constant(), batches, [suite], batch_size=5, sanity=False, journal=Journal(tmp_path / "cut"))
    assert without_time(tmp_path / "cut" / "suite.json") == without_time(tmp_path / "whole" / "suite.json")


def test_two_attacks_whose_names_make_one_file_are_two(tmp_path, victim):
    model, batches = victim
    search = PGD(THREAT, step_size=0.01, steps=1)
    evaluate(model, batches, [EvalAttack("a b", search)], journal=Journal(tmp_path))
    journal = Journal(tmp_path)
    assert evaluate(model, batches, [EvalAttack("a_b", search)], journal=journal)["a_b"].attack == "a_b"
    assert not journal.reused


def test_what_is_complete_is_not_measured_again_unless_asked(tmp_path, victim):
    model, batches = victim
    calls: list[int] = []
    first = evaluate(model, batches, [suite(None, calls)], journal=Journal(tmp_path))
    done = len(calls)
    journal = Journal(tmp_path)
    assert evaluate(model, batches, [suite(None, calls)], journal=journal) == first
    assert (len(calls), journal.reused) == (done, ["suite"])
    evaluate(model, batches, [suite(None, calls)], journal=Journal(tmp_path, again=True))
    assert len(calls) == 2 * done


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 3}, {"attack_all": True}, {"journal": {"weights": "other"}}], ids=str
)
def test_what_was_measured_otherwise_is_measured_anew(tmp_path, victim, change):
    model, batches = victim
    calls: list[int] = []
    evaluate(model, batches, [suite(None, calls)], journal=Journal(tmp_path))
    done = len(calls)
    facts = change.pop("journal", {})
    evaluate(model, batches, [suite(None, calls)], journal=Journal(tmp_path, facts), **change)
    assert len(calls) > done


def test_an_attack_of_this_name_with_other_settings_is_measured_anew(tmp_path, victim):
    model, batches = victim
    for steps in (1, 2):
        attack = EvalAttack("own", PGD(THREAT, step_size=0.01, steps=steps))
        result = evaluate(model, batches, [attack], sanity=False, journal=Journal(tmp_path))["own"]
        assert result.settings["steps"] == steps


def test_what_another_version_found_is_measured_anew(tmp_path, victim, monkeypatch):
    model, batches = victim
    attack = EvalAttack("own", PGD(THREAT, step_size=0.01, steps=1))
    evaluate(model, batches, [attack], sanity=False, journal=Journal(tmp_path))
    monkeypatch.setattr(sys.modules["toughen.evaluation.evaluate"], "version", lambda name: "0.0")
    journal = Journal(tmp_path)
    assert evaluate(model, batches, [attack], sanity=False, journal=journal)["own"].versions["torch"] == "0.0"
    assert not journal.reused


def test_a_file_says_whether_it_is_complete_and_what_decided_it(tmp_path, victim):
    model, batches = victim
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, batches, [suite(2)], batch_size=5, journal=Journal(tmp_path, {"weights_sha256": "w"}))
    assert json.loads((tmp_path / "suite.json").read_text())["complete"] is False
    evaluate(model, batches, [suite()], batch_size=5, journal=Journal(tmp_path, {"weights_sha256": "w"}))
    content = json.loads((tmp_path / "suite.json").read_text())
    assert content["complete"] is True
    assert (content["weights_sha256"], content["seed"], content["batch_size"]) == ("w", 0, 5)
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["settings"]["s0"]["threat"]["eps"] == 0.03


def test_a_name_with_a_fraction_is_a_file(tmp_path, victim):
    model, batches = victim
    attack = parse_attack("pgd-1:eps=2/255", threat=THREAT, step_size=0.01)
    evaluate(model, batches, [attack], journal=Journal(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["pgd-1_eps=2_255.json"]


def test_a_damaged_file_is_named(tmp_path, victim):
    model, batches = victim
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(InputError, match=r"suite\.json is damaged: .*delete it"):
        evaluate(model, batches, [suite()], journal=Journal(tmp_path))


def test_a_journal_that_can_not_be_written_ends_all_processes(tmp_path, victim, monkeypatch):
    model, batches = victim
    (tmp_path / "file").touch()
    handed = []
    monkeypatch.setattr(processes, "gathered", lambda mine: handed.append(mine) or [mine])
    with pytest.raises(InputError, match="can't write"):
        evaluate(model, batches, [suite()], sanity=False, journal=Journal(tmp_path / "file"))
    assert isinstance(handed[-1], InputError)
