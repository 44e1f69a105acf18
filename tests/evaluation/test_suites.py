import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from toughen import PGD, ThreatModel
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, attack_names, evaluate, parse_attack
from zoo import build, images

THREAT = ThreatModel(eps=0.1)


def parse(spec, threat=THREAT):
    return parse_attack(spec, threat=threat, step_size=0.01)


@pytest.mark.parametrize("name", attack_names())
def test_every_listed_name_is_an_attack(name):
    attack = parse(name)
    assert attack.name == name
    for _, search in attack.stages:
        norm = "l2" if name in ("pgd-l2-20", "cw") else "linf"
        assert not hasattr(search, "threat") or search.threat.norm == norm


@pytest.mark.parametrize("name", ["pgd", "pgd-", "pgd-1.5", "pgd-007x", "PGD-10", "", "autoatack"])
def test_any_other_name_is_refused_with_what_there_is(name):
    with pytest.raises(InputError, match=rf"unknown attack '{name}'.*clean, .*any K in pgd-K"):
        parse(name)


@pytest.mark.parametrize("name", ["pgd-0", "pgd--1", "pgd-007", "pgd-l2-0", "feature-100000"])
def test_a_number_of_steps_that_there_cannot_be_is_told(name):
    steps = re.fullmatch(r".+?-(-?\d+)", name)[1]
    with pytest.raises(InputError, match=rf"attack '{name}': steps are {steps}; write 1 to 99999, as in [a-z2-]+-\d0$"):
        parse(name)


def test_any_number_of_steps_is_a_name():
    attack = parse("pgd-37").attack
    assert isinstance(attack, PGD)
    assert (attack.steps, attack.step_size) == (37, 0.01)


def test_settings_stand_behind_colons():
    attack = parse("pgd-20:eps=8/255:keep=worst").attack
    assert (attack.threat.eps, attack.keep, attack.steps) == (8 / 255, "worst", 20)
    # the step is as long relative to the ball as before
    assert attack.step_size == pytest.approx(0.01 * (8 / 255) / 0.1)
    assert parse("pgd-20:eps=0.2:step_size=0.005").attack.step_size == 0.005
    assert parse("square:queries=7").attack.queries == 7


def test_restarts_are_stages_of_which_each_may_break_a_sample():
    attack = parse("pgd-5:restarts=3")
    assert [name for name, _ in attack.stages] == ["restart-1", "restart-2", "restart-3"]
    model, batch = build("nested"), images(20)
    x, _ = batch
    y = model.eval()(x).argmax(dim=1)
    small = ThreatModel(eps=0.02)
    one, three = parse("pgd-1", small), parse("pgd-1:restarts=20", small)
    results = evaluate(model, [(x, y)], [one, three], sanity=False)
    assert results[three.name].accuracy <= results[one.name].accuracy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pgd-20:step=3", r"unknown setting of attack 'pgd-20:step=3' 'step'; did you mean 'steps?_?"),
        ("pgd-20:eps", r"attack 'pgd-20:eps': 'eps' is not a setting; write NAME:key=value"),
        ("pgd-20:eps=-1", r"eps is -1"),
        ("pgd-20:eps=nan", r"attack 'pgd-20:eps=nan': eps is 'nan'; it must be a number or a fraction"),
        ("pgd-20:eps=1/0", r"eps is '1/0'; it must be a number"),
        ("standard:eps=1e999", r"eps is '1e999'; it must be a number"),
        ("pgd-20:eps=0.1:eps=0.2", r"attack 'pgd-20:eps=0.1:eps=0.2': eps is given twice"),
        ("pgd-20:keep=best", r"attack 'pgd-20:keep=best': .*(last|worst)"),
        ("pgd-20:restarts=0", r"restarts is 0"),
        ("pgd-20:restarts=x", r"restarts is 'x'"),
        ("square:queries=0", r"attack 'square:queries=0'.*queries"),
        ("apgd-ce:loss=dlr", r"unknown setting of attack 'apgd-ce:loss=dlr' 'loss'"),
        ("standard:queries=10", r"'standard' is a fixed suite; it takes eps and no other setting"),
        ("clean:eps=1", r"unknown attack 'clean'"),
        ("stadv:eps=0.1", r"unknown setting of attack 'stadv:eps=0.1' 'eps'"),
    ],
)
def test_a_wrong_setting_is_named(spec, message):
    with pytest.raises(InputError, match=message):
        parse(spec)


def test_the_published_suite_and_the_papers_differ_in_the_targets_of_fab_alone():
    standard, paper = parse("standard").settings(), parse("paper").settings()
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert standard.pop("fab-t")["targets"] == 9
    assert paper.pop("fab-t")["targets"] == 3
    assert standard == paper
    assert (standard["apgd-ce"]["steps"], standard["apgd-t"]["targets"], standard["square"]["queries"]) == (
        100,
        9,
        5000,
    )


def test_l2_attacks_keep_their_own_radius_beside_another_norm():
    assert parse("pgd-l2-20").attack.threat == ThreatModel(norm="l2", eps=128 / 255)
    assert parse("pgd-l2-20", ThreatModel(norm="l2", eps=0.7)).attack.threat.eps == 0.7
    assert parse("pgd-l2-20:eps=0.03").attack.step_size == pytest.approx(15 / 255 * 0.03 / (128 / 255))


@dataclass(frozen=True)
class Own:
    """An attack of a user, with a setting."""

    setting: object = None

    def __call__(self, model, x, y, *, generator):
        return x


def plain_function(model, x, y, *, generator):
    return x


@pytest.mark.parametrize(
    "attack", [plain_function, Own, (("first", Own()), ("second", plain_function))], ids=["function", "class", "suite"]
)
def test_an_attack_whose_settings_cannot_be_recorded_is_refused_when_it_is_named(attack):
    with pytest.raises(InputError, match=r"attack 'mine': (plain_function|Own) .*make it a \(frozen\) dataclass"):
        EvalAttack("mine", attack)


def test_a_setting_that_is_no_plain_value_is_refused():
    with pytest.raises(InputError, match=r"attack 'mine': the fields of Own .*PosixPath|WindowsPath"):
        EvalAttack("mine", Own(Path("here")))
    assert EvalAttack("mine", Own([1, "a"])).settings() == {"setting": [1, "a"]}
