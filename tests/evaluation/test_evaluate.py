import pytest
import torch
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen import PGD, ThreatModel
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, attack_names, evaluate, parse_attack
from zoo import ZOO, build, images

THREAT = ThreatModel(eps=0.1)
CLEAN = EvalAttack("clean", None)


class Brightness(nn.Module):
    """Says class 1 where the mean of the image is above one half; pixels move it, each by 1/n."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        margin = self.gain * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


# four grey images at these levels: with eps = 0.1 an attack moves a level by 0.1 and no more
LEVELS = torch.tensor([0.2, 0.45, 0.55, 0.9])
LABELS = torch.tensor([0, 0, 1, 0])  # the last one is wrong already


def greys() -> list[tuple[Tensor, Tensor]]:
    return [(LEVELS[:, None, None, None].expand(4, 1, 2, 2).clone(), LABELS)]


def pgd(steps: int = 5) -> EvalAttack:
    return parse_attack(f"pgd-{steps}", threat=THREAT, step_size=0.05)


def noisy_model() -> nn.Module:
    return build("nested")


def test_clean_accuracy_is_the_hand_count():
    result = evaluate(Brightness(), greys(), [CLEAN])["clean"]
    assert result.correct == (True, True, True, False)
    assert (result.n, result.accuracy) == (4, 0.75)


def test_an_attack_fells_what_it_can_reach_and_what_was_wrong_already():
    result = evaluate(Brightness(), greys(), [pgd()])["pgd-5"]
    assert result.correct == (True, False, False, False)
    assert result.accuracy == 0.25


def test_fgsm_is_one_step_of_eps_from_the_image_itself():
    attack = parse_attack("fgsm", threat=THREAT, step_size=0.0)
    assert evaluate(Brightness(), greys(), [attack])["fgsm"].correct == (True, False, False, False)


def test_misclassified_images_are_not_attacked():
    seen = []

    class Watching(PGD):
        def __call__(self, model, x, y, **options):
            seen.append(len(x))
            return super().__call__(model, x, y, **options)

    attack = EvalAttack("watched", Watching(THREAT, step_size=0.05, steps=1))
    evaluate(Brightness(), greys(), [attack])
    all_wrong = [(greys()[0][0], 1 - LABELS[torch.tensor([0, 0, 2, 0])])]
    evaluate(Brightness(), [(all_wrong[0][0][:1], torch.tensor([1]))], [attack])
    assert seen == [3]


def test_an_attack_that_helps_the_model_does_not_count_for_it():
    class Helping(PGD):
        def __call__(self, model, x, y, **options):
            return y.float()[:, None, None, None].expand_as(x).clone()

    attack = EvalAttack("helping", Helping(THREAT, step_size=0.05, steps=1))
    assert evaluate(Brightness(), greys(), [attack])["helping"].correct == (True, True, True, False)


def test_the_same_seed_gives_the_same_outcome_and_another_seed_another_attack():
    model, data = noisy_model(), [images(40, seed=1)]
    attack = parse_attack("pgd-2", threat=ThreatModel(eps=0.02), step_size=0.005)
    first = evaluate(model, data, [attack], seed=3)["pgd-2"]
    torch.rand(7)
    assert evaluate(model, data, [attack], seed=3)["pgd-2"] == first

    points = []

    class Recording(PGD):
        def __call__(self, model, x, y, **options):
            points.append(super().__call__(model, x, y, **options))
            return points[-1]

    recorded = EvalAttack("recorded", Recording(ThreatModel(eps=0.02), step_size=0.005, steps=1))
    labels = model.eval()(data[0][0]).argmax(dim=1)
    for seed in (3, 3, 4):
        evaluate(model, [(data[0][0], labels)], [recorded], seed=seed)
    assert torch.equal(points[0], points[1])
    assert not torch.equal(points[0], points[2])


def test_a_result_does_not_depend_on_the_other_attacks_of_the_list():
    model, data = noisy_model(), [images(30, seed=1), images(30, seed=2)]
    alone = evaluate(model, data, [pgd(3)])["pgd-3"]
    fgsm = parse_attack("fgsm", threat=THREAT, step_size=0.1)
    among = evaluate(model, data, [fgsm, CLEAN, pgd(2), pgd(3)])
    assert among["pgd-3"] == alone
    assert list(among) == ["fgsm", "clean", "pgd-2", "pgd-3"]


def test_results_keep_the_order_of_the_samples_over_batches():
    (x, y) = greys()[0]
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert evaluate(Brightness(), batches, [CLEAN])["clean"].correct == (True, True, True, False)


def test_plain_values_hold_totals_settings_and_every_sample():
    content = evaluate(Brightness(), greys(), [pgd()], seed=2)["pgd-5"].to_dict()
    assert content["correct"] == [1, 0, 0, 0]
    assert (content["accuracy"], content["n"], content["seed"]) == (0.25, 4, 2)
    assert content["settings"]["steps"] == 5
    assert content["settings"]["threat"]["eps"] == 0.1


def test_progress_is_told_after_each_batch():
    told: list[int] = []
    x, y = images(5)
    evaluate(noisy_model(), [(x[:2], y[:2]), (x[2:], y[2:])], [CLEAN], progress=told.append)
    assert told == [2, 5]


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_left_as_found(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        evaluate(model, [images(4)], [CLEAN, pgd(2)])


def test_a_model_is_left_as_found_when_the_images_are_refused():
    model = build("nested")
    disturb(model)
    x, y = images(4)
    x[2, 0, 0, 0] = float("nan")
    with left_as_found(model), pytest.raises(InputError, match="image 2 of a batch has NaN"):
        evaluate(model, [(x, y)], [pgd(2)])


def test_images_outside_the_box_are_refused():
    x, y = images(4)
    with pytest.raises(InputError, match=r"normalisation .* belongs inside the model"):
        evaluate(build("nested"), [(x * 255, y)], [CLEAN])


def test_no_images_are_refused():
    with pytest.raises(InputError, match="the batches are empty"):
        evaluate(build("nested"), [], [CLEAN])


def test_two_attacks_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"attack 'pgd-2' is named twice"):
        evaluate(build("nested"), [images(4)], [pgd(2), pgd(2)])


@pytest.mark.parametrize("name", attack_names())
def test_every_listed_name_is_an_attack(name):
    attack = parse_attack(name, threat=THREAT, step_size=0.01)
    assert attack.name == name
    if attack.attack is not None:
        assert attack.attack.threat == THREAT


@pytest.mark.parametrize("name", ["pgd", "pgd-0", "pgd-", "pgd--1", "pgd-1.5", "pgd-007x", "PGD-10", "", "autoatack"])
def test_any_other_name_is_refused_with_what_there_is(name):
    with pytest.raises(InputError, match=rf"unknown attack '{name}'.*clean, fgsm.*any K in pgd-K"):
        parse_attack(name, threat=THREAT, step_size=0.01)


def test_any_number_of_steps_is_a_name():
    attack = parse_attack("pgd-37", threat=THREAT, step_size=0.01).attack
    assert isinstance(attack, PGD)
    assert (attack.steps, attack.step_size) == (37, 0.01)


def test_a_sample_whose_logits_are_not_numbers_counts_as_fallen():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), float("nan"))

    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert evaluate(Broken(), [(x, y)], [EvalAttack("clean", None)])["clean"].accuracy == 0
