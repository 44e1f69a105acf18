"""Flags that results raise: a weaker attack must not do better than a stronger one by more than chance."""

from dataclasses import replace
from typing import Any

import pytest

from toughen.evaluation.outcomes import EvalResult, Flag, Stage
from toughen.evaluation.sanity import check_results, check_transfer

N = 1000


def result(attack: str, standing: int, *, n: int = N, stages: tuple[Stage, ...] = (), **settings: Any) -> EvalResult:
    """The first ``standing`` of n samples stand."""
    correct = tuple(i < standing for i in range(n))
    return EvalResult(
        attack=attack,
        settings=settings,
        seed=0,
        batch_size=100,
        attack_all=False,
        index=tuple(range(n)),
        label=(0,) * n,
        correct=correct,
        loss=(0.0,) * n,
        distance=(0.0,) * n,
        fell=tuple(None if right else attack for right in correct),
        stages=stages or (Stage(attack, n, n - standing),),
    )


def pgd(steps: int, standing: int, *, eps: float = 0.03, n: int = N, **settings: Any) -> EvalResult:
    threat = {"norm": "linf", "eps": eps, "bounds": [0.0, 1.0]}
    fields = {"threat": threat, "step_size": 0.007, "steps": steps, **settings}
    return result(f"pgd-{steps}", standing, n=n, **{f"pgd-{steps}": fields})


def fgsm(standing: int, *, eps: float = 0.03, n: int = N) -> EvalResult:
    return replace(pgd(1, standing, eps=eps, step_size=eps, n=n), attack="fgsm")


def square(standing: int, *, eps: float = 0.03, n: int = N) -> EvalResult:
    threat = {"norm": "linf", "eps": eps, "bounds": [0.0, 1.0]}
    return result("square", standing, n=n, square={"threat": threat, "queries": 5000})


def seen(*results: EvalResult) -> list[str]:
    return [flag.check for flag in check_results({f"{i}/{r.attack}": r for i, r in enumerate(results)})]


def test_an_honest_evaluation_raises_no_flag():
    assert seen(result("clean", 900), fgsm(600), pgd(10, 540), pgd(20, 530), pgd(100, 529), square(560)) == []


def test_more_steps_that_help_the_model_are_seen():
    (flag,) = check_results({"pgd-10": pgd(10, 500), "pgd-100": pgd(100, 520)})
    assert flag.check == "more-steps-help"
    assert flag.seen == "52.0% of 1000 samples stand under pgd-100, but 50.0% of 1000 samples stand under pgd-10"


def test_the_strongest_of_the_weaker_attacks_is_named():
    flags = check_results({"pgd-10": pgd(10, 510), "pgd-20": pgd(20, 490), "pgd-50": pgd(50, 540)})
    assert [flag.check for flag in flags] == ["more-steps-help"]
    assert flags[0].seen.endswith("under pgd-20")


def test_two_tenths_of_a_point_and_chance_are_allowed():
    assert seen(pgd(10, 5000, n=10_000), pgd(20, 5020, n=10_000)) == []  # 0.2 points, all on one side
    assert seen(pgd(10, 5000, n=10_000), pgd(20, 5021, n=10_000)) == ["more-steps-help"]
    assert seen(pgd(10, 50, n=100), pgd(20, 56, n=100)) == []  # six samples to none: p = 0.03
    assert seen(pgd(10, 50, n=100), pgd(20, 57, n=100)) == ["more-steps-help"]


def test_samples_are_paired():
    few, many = pgd(10, 500), pgd(20, 500)
    # each of the two breaks some that the other leaves: 60 and 40 of them could be chance, 80 and 20 not
    flip = [not right if i < 40 or 500 <= i < 560 else right for i, right in enumerate(many.correct)]
    assert seen(few, replace(many, correct=tuple(flip))) == []
    flip = [not right if i < 20 or 500 <= i < 580 else right for i, right in enumerate(many.correct)]
    assert seen(few, replace(many, correct=tuple(flip))) == ["more-steps-help"]


def test_only_results_that_differ_in_steps_alone_are_compared():
    assert seen(pgd(10, 500), pgd(20, 600, step_size=0.001)) == []
    assert seen(pgd(10, 500, eps=0.03), pgd(20, 600, eps=0.01)) == []
    assert seen(pgd(10, 500, restarts=1), pgd(20, 600, restarts=5)) == []
    assert seen(pgd(10, 50, n=100), pgd(20, 600)) == []


def test_a_larger_eps_that_helps_the_model_is_seen_also_when_steps_scale_along():
    near, far = pgd(10, 500, eps=0.03, step_size=0.007), pgd(10, 530, eps=0.06, step_size=0.014)
    assert seen(near, far) == ["larger-eps-helps"]
    assert seen(replace(near, correct=far.correct), replace(far, correct=near.correct)) == []


def test_one_step_that_beats_many_is_seen_under_the_same_threat_only():
    assert seen(fgsm(500), pgd(10, 540)) == ["one-step-beats-many"]
    assert seen(fgsm(500, eps=0.06), pgd(10, 540)) == []
    assert seen(fgsm(540), pgd(10, 500)) == []


def suite(*stages: Stage, name: str = "standard", n: int = N) -> EvalResult:
    threat = {"norm": "linf", "eps": 0.03, "bounds": [0.0, 1.0]}
    settings = {stage.name: {"threat": threat} for stage in stages}
    return result(name, n - sum(stage.fell for stage in stages), n=n, stages=stages, **settings)


def test_square_after_the_white_box_stages_may_break_two_tenths_of_a_point():
    white = Stage("apgd-ce", 900, 400), Stage("apgd-t", 500, 20)
    assert seen(suite(*white, Stage("square", 480, 2))) == []
    (flag,) = check_results({"standard": suite(*white, Stage("square", 480, 3))})
    assert flag.check == "black-box-beats-white-box"
    assert flag.seen == (
        "in standard, square broke 3 of the 480 samples that attacks with the gradient had left "
        "(0.3% of all, allowed 0.2%)"
    )


def test_one_sample_of_a_few_is_no_flag():
    white = Stage("apgd-ce", 90, 40)
    assert seen(suite(white, Stage("square", 50, 1), n=100)) == []
    assert seen(suite(white, Stage("square", 50, 2), n=100)) == ["black-box-beats-white-box"]


def test_square_without_a_white_box_stage_before_it_is_no_flag():
    assert seen(suite(Stage("square", 900, 300))) == []
    assert seen(suite(Stage("square", 900, 300), Stage("apgd-ce", 600, 100))) == []


def test_square_alone_must_not_beat_the_strongest_attack_with_the_gradient():
    flags = check_results({"pgd-10": pgd(10, 600), "pgd-20": pgd(20, 590), "square": square(560)})
    assert [flag.check for flag in flags] == ["black-box-beats-white-box"]
    assert flags[0].seen == "59.0% of 1000 samples stand under pgd-20, but 56.0% of 1000 samples stand under square"


def test_square_may_beat_a_single_step_or_an_attack_with_another_eps():
    assert seen(fgsm(600), square(560)) == []
    assert seen(pgd(10, 600, eps=0.01), square(560)) == []


def test_attacks_without_an_eps_are_not_compared():
    assert seen(pgd(10, 600), result("pixle", 20, pixle={"restarts": 20}), result("clean", 900)) == []


def test_settings_may_also_stand_without_the_name_of_the_attack():
    plain = [replace(one, settings=one.settings[one.attack]) for one in (pgd(10, 500), pgd(100, 530))]
    assert seen(*plain) == ["more-steps-help"]


NAMES = ("a", "b", "c")


def test_transfer_that_beats_white_box_is_seen_for_the_victim_by_its_worst_attacker():
    accuracy = [[0.40, 0.70, 0.35], [0.75, 0.45, 0.20], [0.80, 0.70, 0.50]]
    (flag,) = check_transfer(NAMES, accuracy, 1000)
    assert flag.check == "transfer-beats-white-box"
    assert flag.seen.startswith("c keeps 20.0% under the attack made on b, 50.0% under its own (n = 1000,")


def test_an_honest_matrix_raises_no_flag():
    assert check_transfer(NAMES, [[0.4, 0.7, 0.6], [0.7, 0.4, 0.6], [0.7, 0.7, 0.4]], 1000) == ()
    assert check_transfer(("a",), [[0.0]], 1) == ()


@pytest.mark.parametrize(
    ("white", "transfer", "n", "flagged"),
    [
        (0.50, 0.45, 1000, False),  # 2.33 standard errors are 5.2 points
        (0.50, 0.44, 1000, True),
        (0.50, 0.48, 10_000, True),
        (1.0, 0.0, 6, False),  # six samples are too few for any claim
        (1.0, 0.0, 7, True),
        (0.002, 0.0, 10_000, True),
        (0.0019, 0.0, 10_000, False),
    ],
)
def test_the_margin_of_chance_depends_on_the_number_of_samples(white, transfer, n, flagged):
    assert bool(check_transfer(("a", "b"), [[0.0, transfer], [0.9, white]], n)) is flagged


def test_a_flag_is_one_line_and_plain_values():
    flag = Flag("more-steps-help", "60% stand, but 50%", "look again")
    assert str(flag) == "more-steps-help: 60% stand, but 50%; look again"
    assert flag.to_dict() == {"check": "more-steps-help", "seen": "60% stand, but 50%", "advice": "look again"}


def test_a_black_box_attack_with_settings_is_one_too():
    threat = {"norm": "linf", "eps": 0.1}
    found = {
        "pgd-20": result("pgd-20", 900, threat=threat, steps=20),
        "square:queries=300": result("square:queries=300", 400, threat=threat, queries=300),
    }
    assert "black-box-beats-white-box" in [flag.check for flag in check_results(found)]
