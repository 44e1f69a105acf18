import json

import pytest
import torch
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen import PGD, Batch, ThreatModel
from toughen.errors import InputError
from toughen.evaluation import Attacked, EvalAttack, EvalResult, evaluate, parse_attack, transfer
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


def test_progress_tells_the_attack_the_samples_done_and_those_to_do():
    told: list[tuple[str, int, int]] = []
    x, y = images(5)
    model = noisy_model()
    y = model.eval()(x).argmax(dim=1)
    evaluate(
        model, [(x[:2], y[:2]), (x[2:], y[2:])], [CLEAN, pgd(1)], sanity=False, progress=lambda *now: told.append(now)
    )
    assert told == [("pgd-1", 0, 5), ("pgd-1", 2, 5), ("pgd-1", 4, 5), ("pgd-1", 5, 5)]


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pgd-5", r"the name 'pgd-5'; make it one with parse_attack\(\"pgd-5\", threat=\.\.\., step_size=\.\.\.\)"),
        (PGD(THREAT, step_size=0.1), r"given as PGD; make it one with EvalAttack\(\"NAME\", \.\.\.\)"),
    ],
    ids=["name", "search"],
)
def test_what_is_no_attack_yet_is_refused_with_the_call_that_makes_it_one(given, expected):
    with pytest.raises(InputError, match=expected):
        evaluate(build("nested"), [images(4)], [given])
    with pytest.raises(InputError, match=expected):
        transfer({"nested": build("nested")}, [images(4)], given)


def test_what_a_model_raises_itself_is_told_with_its_kind():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("scale")

    with pytest.raises(InputError, match=r"model Broken fails on images of shape \[4, .*\]: KeyError: 'scale'") as told:
        evaluate(Broken(), [images(4)], [CLEAN])
    assert isinstance(told.value.__cause__, KeyError)


def test_a_sample_whose_logits_are_not_numbers_counts_as_fallen():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), float("nan"))

    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert evaluate(Broken(), [(x, y)], [EvalAttack("clean", None)])["clean"].accuracy == 0


class Falling:
    """A search that turns the images at these levels black, if it meets them, and remembers what it was shown."""

    def __init__(self, *levels: float) -> None:
        self.levels, self.shown = levels, []

    def __call__(self, model, x, y, *, generator):
        self.shown.append([round(float(image.mean()), 2) for image in x])
        black = torch.tensor([any(abs(float(image.mean()) - level) < 1e-3 for level in self.levels) for image in x])
        # whatever the label: the other side of the decision
        other = (1 - y.float())[:, None, None, None].expand_as(x)
        return torch.where(black[:, None, None, None], other, x)


@pytest.fixture
def plain_settings(monkeypatch):
    monkeypatch.setattr(EvalAttack, "settings", lambda self: {name: "a test's own" for name, _ in self.stages})


def many(levels: list[float]) -> tuple[Tensor, Tensor]:
    column = torch.tensor(levels)
    return column[:, None, None, None].expand(len(levels), 1, 2, 2).clone(), (column > 0.5).long()


def test_each_stage_of_a_suite_meets_in_full_batches_what_still_stands(plain_settings):
    x, y = many([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
    first, second, third = Falling(0.2, 0.6), Falling(0.1), Falling()
    suite = EvalAttack("suite", (("a", first), ("b", second), ("c", third)))
    result = evaluate(Brightness(), [(x[:3], y[:3]), (x[3:], y[3:])], [suite], batch_size=2, sanity=False)["suite"]
    assert first.shown == [[0.1, 0.2], [0.3, 0.4], [0.6, 0.7], [0.8]]
    assert second.shown == [[0.1, 0.3], [0.4, 0.7], [0.8]]
    assert third.shown == [[0.3, 0.4], [0.7, 0.8]]
    assert result.fell == ("b", "a", None, None, "a", None, None)
    assert [(stage.name, stage.attacked, stage.fell) for stage in result.stages] == [
        ("a", 7, 2),
        ("b", 5, 1),
        ("c", 4, 0),
    ]
    assert result.accuracy == pytest.approx(4 / 7)


def test_loss_and_distance_are_those_of_the_point_that_broke_the_sample():
    result = evaluate(Brightness(), greys(), [pgd(20)], sanity=False)["pgd-20"]
    model = Brightness()
    assert result.fell == (None, "pgd-20", "pgd-20", "clean")
    worst = [LEVELS[0] + 0.1, LEVELS[1] + 0.1, LEVELS[2] - 0.1, LEVELS[3]]
    for level, label, loss, distance in zip(worst, LABELS, result.loss, result.distance, strict=True):
        logits = model(torch.full((1, 1, 2, 2), float(level))).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, label[None])), rel=1e-4)
        assert distance == pytest.approx(0.0 if label == 0 and level > 0.8 else 0.1, rel=1e-4)


def test_an_image_outside_the_ball_does_not_count(plain_settings):
    class Far(Falling):
        threat = ThreatModel(eps=0.3)

    x, y = many([0.25, 0.4, 0.9])
    result = evaluate(Brightness(), [(x, y)], [EvalAttack("far", Far(0.25, 0.4, 0.9))], sanity=False)["far"]
    assert result.correct == (True, True, True)


def test_an_attack_that_leaves_the_image_box_is_refused(plain_settings):
    def outside(model, x, y, *, generator):
        return x + 2

    with pytest.raises(InputError, match=r"attack 'outside' returned pixels that are not in \[0, 1\]"):
        evaluate(Brightness(), greys(), [EvalAttack("outside", outside)])


def test_passes_are_counted_per_image():
    result = evaluate(Brightness(), greys(), [pgd(5)], sanity=False)["pgd-5"]
    (stage,) = result.stages
    # three images stand: five gradients each, and one more look at what came out
    assert (stage.attacked, stage.forwards, stage.backwards) == (3, 3 * 6, 3 * 5)


class Turned:
    """Batches that come in another order each time, as from a loader that shuffles."""

    def __init__(self) -> None:
        self.batches = [(x[k : k + 1], y[k : k + 1]) for x, y in greys() for k in range(4)]

    def __iter__(self):
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


class Once:
    """Batches that are gone when they were seen, though they do not say so."""

    def __init__(self) -> None:
        self.left = iter(greys())

    def __iter__(self):
        return self.left


@pytest.mark.parametrize("batches", [Turned, Once])
def test_batches_that_are_other_ones_when_iterated_again_are_refused(batches):
    with pytest.raises(InputError, match=r"don't hold the same samples from sample \d on: switch shuffling off"):
        evaluate(Brightness(), batches(), [pgd()], sanity=False)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_of_the_model_is_refused(label):
    x, y = greys()[0]
    y = torch.where(torch.arange(4) == 3, label, y)
    with pytest.raises(InputError, match=rf"labels range from .*{label}.*; with 2 classes they must be 0 to 1"):
        evaluate(Brightness(), [(x, y)], [CLEAN])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_images_too_coarse_for_a_ball_are_refused(dtype):
    x, y = greys()[0]
    with pytest.raises(InputError, match=f"images are {dtype}, too coarse"):
        evaluate(Brightness(), [(x.to(dtype), y)], [CLEAN])


def test_a_model_that_answers_in_float64_is_measured_as_any_other():
    class Precise(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    assert evaluate(Precise(), greys(), [pgd()])["pgd-5"].correct == (True, False, False, False)


def test_a_seed_may_be_any_whole_number():
    square = parse_attack("square:queries=5", threat=THREAT, step_size=0.05)
    suite = EvalAttack("suite", (*square.stages, *parse_attack("apgd-ce", threat=THREAT, step_size=0.05).stages))
    for seed in (-1, 10**30):
        assert evaluate(Brightness(), greys(), [suite], seed=seed)["suite"].accuracy == 0.25


def test_images_that_can_be_iterated_only_once_are_enough():
    once = ((x, y) for x, y in greys())
    assert evaluate(Brightness(), once, [pgd()])["pgd-5"].correct == (True, False, False, False)


def test_who_listens_sees_every_attacked_image_also_the_wrong_ones_if_asked():
    for attack_all, expected in ((False, [0, 1, 2]), (True, [0, 1, 2, 3])):
        seen: list[Attacked] = []
        evaluate(Brightness(), greys(), [pgd()], attack_all=attack_all, on_attacked=seen.append, sanity=False)
        assert torch.cat([chunk.where for chunk in seen]).tolist() == expected
        assert torch.cat([chunk.broke for chunk in seen]).tolist()[:3] == [False, True, True]
        assert float((seen[0].x_adv - greys()[0][0][expected]).abs().max()) == pytest.approx(0.1, rel=1e-4)


def test_accuracy_by_class_counts_each_class_alone():
    result = evaluate(Brightness(), greys(), [CLEAN])["clean"]
    assert result.per_class() == {0: (2 / 3, 3), 1: (1.0, 1)}


def test_a_batch_that_knows_its_place_tells_it():
    x, y = greys()[0]
    result = evaluate(Brightness(), [Batch(x, y, torch.tensor([7, 5, 3, 1]))], [CLEAN])["clean"]
    assert result.index == (7, 5, 3, 1)


def test_a_result_survives_the_way_through_json():
    result = evaluate(Brightness(), greys(), [pgd()], seed=2)["pgd-5"]
    assert EvalResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_sample_that_an_attack_loses_among_numbers_that_are_none_is_judged_by_its_image(plain_settings):
    def lost(model, x, y, *, generator):
        return torch.full_like(x, float("nan"))

    result = evaluate(Brightness(), greys(), [EvalAttack("lost", lost)], sanity=False)["lost"]
    assert result.correct == (True, True, True, False)
