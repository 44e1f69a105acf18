"""Properties that any analysis must have, whatever the network."""

import math

import pytest
import torch
from torch import nn

from as_found import disturb, left_as_found
from toughen.attacks import PGD
from toughen.criticality import CriticalityOptions, analyze
from toughen.errors import InputError
from toughen.types import Batch, ThreatModel
from zoo import EVERY, ZOO, build, images

X, Y = images(6)
NOISE = 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
THREAT = ThreatModel(eps=0.1)
# No random start: what it does to an image does not depend on the batch around it.
PGD2 = PGD(THREAT, step_size=0.05, steps=2, random_start=False)


class Shift:
    """An "attack" that adds what it is told to."""

    threat = ThreatModel(eps=1.0)

    def __init__(self, delta):
        self.delta = delta

    def __call__(self, model, x, y, **_):
        return x + self.delta


def weaknesses(report):
    return {row.name: row.weakness for row in report.rows}


def indices(report):
    return {row.name: row.criticality for row in report.rows}


@pytest.mark.parametrize("name", ["backwards", "normed", "resnet18"])
@pytest.mark.parametrize("measure", ["index", "curvature"])
def test_the_product_of_indices_telescopes_to_the_weakness(name, measure):
    report = analyze(build(name), [(X, Y)], PGD2, options=CriticalityOptions(measure=measure))
    product = 1.0
    for row in report.rows:
        product *= row.criticality
        assert product == pytest.approx(row.weakness, rel=1e-5)


def test_weakness_is_eq_2_by_hand():
    model = build("backwards")
    report = analyze(model, [(X, Y)], PGD2)
    x_adv = PGD2(model, X, Y)
    with torch.no_grad():
        first = [model.first(images).double() for images in (X, x_adv)]
        second = [model.second(model.first(images).relu()).double() for images in (X, x_adv)]
    w1, w2 = (float((b - a).flatten(1).norm(dim=1).mean()) / a[0].numel() for a, b in (first, second))
    assert report.rows[0].weakness == pytest.approx(w1, rel=1e-5)
    assert report.rows[0].criticality == report.rows[0].weakness
    assert report.rows[1].criticality == pytest.approx(w2 / w1, rel=1e-5)
    assert report.rows[1].shape_ratio == 4 * 6 * 6 / (5 * 4 * 4)


@pytest.mark.parametrize("name", ZOO)
def test_unmoved_images_give_zero_weakness_and_a_refusal_without_nan(name):
    report = analyze(build(name), [(X, Y)], PGD(ThreatModel(eps=0.0), step_size=0.1, steps=1))
    assert {row.weakness for row in report.rows} <= {0.0, None}
    assert "nan" not in str(report).lower()
    with pytest.raises(InputError, match="the perturbed images equal the clean ones"):
        report.top(1)


def test_scaling_one_layer_of_a_bias_free_relu_network_scales_its_index_alone():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4, bias=False)
    )
    delta = NOISE
    before = analyze(model, [(X, Y)], Shift(delta)).rows
    with torch.no_grad():
        model[2].weight.mul_(4.0)
    after = analyze(model, [(X, Y)], Shift(delta)).rows
    assert [a.criticality / b.criticality for a, b in zip(after, before, strict=True)] == pytest.approx([1, 4, 1, 1])
    assert [a.weakness / b.weakness for a, b in zip(after, before, strict=True)] == pytest.approx([1, 4, 4, 4])


@pytest.mark.parametrize("expectation", ["mean", "rms"])
def test_a_repeated_batch_changes_nothing(expectation):
    options = CriticalityOptions(expectation=expectation)
    once = analyze(build("nested"), [(X, Y)], PGD2, options=options)
    twice = analyze(build("nested"), [(X, Y), (X, Y)], PGD2, options=options)
    assert indices(twice) == pytest.approx(indices(once), rel=1e-12)
    assert twice.settings["num_samples"] == 2 * once.settings["num_samples"] == 12


def test_a_permuted_batch_changes_nothing():
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    straight = analyze(build("nested"), [(X, Y)], PGD2)
    permuted = analyze(build("nested"), [(X[order], Y[order])], PGD2)
    assert weaknesses(permuted) == pytest.approx(weaknesses(straight), rel=1e-4)


def test_two_batches_are_the_mean_over_all_images_in_any_order():
    parts = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    whole = analyze(build("nested"), [(X, Y)], PGD2)
    for batches in (parts, parts[::-1]):
        assert weaknesses(analyze(build("nested"), batches, PGD2)) == pytest.approx(weaknesses(whole), rel=1e-4)


def test_of_a_linear_map_it_is_the_length_of_a_d():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Linear(7, 4)).double()
    delta = NOISE.double()
    report = analyze(model, [(X.double(), Y)], Shift(delta))
    moved = delta.flatten(1) @ model[1].weight.detach().T
    assert report.rows[0].weakness == pytest.approx(float(moved.norm(dim=1).mean()) / 7, rel=1e-9)


@pytest.mark.parametrize("norm", ["dim", "rms", "none", "relative"])
def test_norms_differ_by_their_divisor(norm):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Linear(7, 4)).double()
    delta = torch.full(X.shape, 0.05, dtype=torch.float64)
    row = analyze(model, [(X.double(), Y)], Shift(delta), options=CriticalityOptions(norm=norm)).rows[0]
    clean = model[1](X.double().flatten(1)).detach()
    length = (delta.flatten(1) @ model[1].weight.detach().T).norm(dim=1)
    size = {"dim": 7.0, "rms": math.sqrt(7), "none": 1.0, "relative": clean.norm(dim=1)}[norm]
    assert row.weakness == pytest.approx(float((length / size).mean()), rel=1e-9)


def test_the_rms_expectation_is_the_norm_of_the_whole_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Linear(7, 4)).double()
    delta = NOISE.double()
    options = CriticalityOptions(norm="none", expectation="rms")
    row = analyze(model, [(X.double(), Y)], Shift(delta), options=options).rows[0]
    moved = delta.flatten(1) @ model[1].weight.detach().T
    assert row.weakness == pytest.approx(float(moved.norm()) / math.sqrt(6), rel=1e-9)


class Residual(nn.Module):
    """The second branch reads the image, not what the first branch computed."""

    def __init__(self):
        super().__init__()
        self.main = nn.Conv2d(3, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc((self.main(x).relu() + self.shortcut(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("expectation", "over"), [("mean", torch.mean), ("rms", lambda lengths: lengths.square().mean().sqrt())]
)
def test_the_graph_predecessor_is_the_tensor_that_enters_the_layer(expectation, over):
    model = Residual().double()
    delta = NOISE.double()
    x = X.double()
    by_graph, by_order = (
        analyze(model, [(x, Y)], Shift(delta), options=CriticalityOptions(predecessor=p, expectation=expectation)).rows
        for p in ("graph", "execution")
    )
    image = float(over(delta.flatten(1).norm(dim=1))) / 192
    with torch.no_grad():
        pooled = [(model.main(z).relu() + model.shortcut(z)).mean(dim=(2, 3)) for z in (x, x + delta)]
    entering_fc = float(over((pooled[1] - pooled[0]).norm(dim=1))) / 4
    assert [row.weakness for row in by_graph] == [row.weakness for row in by_order]
    assert by_graph[0].criticality == by_graph[0].weakness  # first="literal"
    assert by_graph[1].criticality == pytest.approx(by_graph[1].weakness / image, rel=1e-9)
    assert by_graph[2].criticality == pytest.approx(by_graph[2].weakness / entering_fc, rel=1e-9)
    assert by_order[1].criticality == pytest.approx(by_order[1].weakness / by_order[0].weakness)


@pytest.mark.parametrize("predecessor", ["execution", "graph"])
def test_the_first_layer_can_be_divided_by_the_weakness_of_the_image(predecessor):
    delta = NOISE
    options = CriticalityOptions(first="input_ratio", predecessor=predecessor)
    row = analyze(Residual(), [(X, Y)], Shift(delta), options=options).rows[0]
    image = float(delta.flatten(1).norm(dim=1).mean()) / 192
    assert row.criticality == pytest.approx(row.weakness / image, rel=1e-5)


def test_features_can_be_read_behind_the_batch_norm():
    model = build("normed").eval()
    delta = NOISE
    behind = analyze(model, [(X, Y)], Shift(delta), options=CriticalityOptions(tapped="norm")).rows
    before = analyze(model, [(X, Y)], Shift(delta)).rows
    with torch.no_grad():
        moved = model.bn1(model.conv1(X + delta)) - model.bn1(model.conv1(X))
    assert behind[0].weakness == pytest.approx(float(moved.flatten(1).norm(dim=1).mean()) / 256, rel=1e-4)
    assert behind[0].name == "conv1"
    assert behind[1:] != before[1:]  # C_2 has another divisor
    assert behind[2].weakness == before[2].weakness  # without a batch norm: the output


def test_in_place_changes_downstream_do_not_enter_the_measurement():
    model = build("in_place").eval()
    delta = NOISE
    row = analyze(model, [(X, Y)], Shift(delta)).rows[0]
    with torch.no_grad():
        moved = model.conv(X + delta) - model.conv(X)
    assert row.weakness == pytest.approx(float(moved.flatten(1).norm(dim=1).mean()) / 256, rel=1e-5)


def test_the_analysis_runs_in_eval_mode_and_clean_and_perturbed_do_not_mix():
    model = build("normed").train()
    assert analyze(model, [(X, Y)], PGD2) == analyze(model.eval(), [(X, Y)], PGD2)


@pytest.mark.parametrize(
    "options", [{}, {"measure": "curvature"}, {"predecessor": "graph"}, {"tapped": "norm"}], ids=str
)
@pytest.mark.parametrize("name", EVERY)
def test_an_analysis_of_any_network_leaves_it_as_found_and_holds_no_nan(name, options):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        report = analyze(model, [(X, Y)], PGD2, options=CriticalityOptions(**options))
    assert "NaN" not in report.to_json()
    for row in report.rows:
        assert row.weakness is None or (math.isfinite(row.weakness) and row.weakness >= 0)
        assert row.criticality is None or math.isfinite(row.criticality)
        assert row.name in str(report)
    for note in report.notes:
        assert note in str(report)


def test_the_model_is_left_as_found_when_it_raises():
    model = build("normed")
    disturb(model)
    model.bn2.num_features = 0
    model.conv3.forward = lambda x: 1 / 0
    with left_as_found(model), pytest.raises(ZeroDivisionError):
        analyze(model, [(X, Y)], PGD2)


def test_a_layer_called_twice_is_reported_and_its_successor_looks_past_it():
    report = analyze(build("called_twice"), [(X, Y)], PGD2)
    first, again, head = report.rows
    assert (again.weakness, again.criticality, again.num_samples) == (None, None, 0)
    assert head.criticality == pytest.approx(head.weakness / first.weakness)
    assert "again: runs more than once per forward, so has no single feature" in report.notes
    assert [row.name for row in report.ranked()] == ["first"]


def test_a_layer_that_never_runs_is_reported():
    report = analyze(build("unused"), [(X, Y)], PGD2)
    assert [row.name for row in report.rows] == ["conv", "head.fc"]
    assert "spare: owns weights but was never called in the forward" in report.notes


def test_a_dead_layer_is_reported_and_its_successor_has_no_index():
    model = build("backwards")
    with torch.no_grad():
        model.second.weight.zero_()
    report = analyze(model, [(X, Y)], Shift(0.05))
    assert [row.weakness == 0 for row in report.rows] == [False, True, True, True]
    assert [row.criticality for row in report.rows][1:] == [0.0, None, None]
    assert "second: its features do not move (weakness 0)" in report.notes
    assert [row.name for row in report.ranked()] == ["first", "second"]


def test_features_that_are_not_finite_are_reported_and_not_ranked():
    model = build("backwards")
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = math.inf
    report = analyze(model, [(X, Y)], Shift(0.05))
    assert [row.weakness is None for row in report.rows] == [False, True, True, True]
    assert any(note.startswith("second: ") and "not finite" in note for note in report.notes)
    assert "nan" not in report.to_json().lower()
    assert [row.name for row in report.ranked()] == ["first"]


def test_a_layer_that_only_some_forwards_run_is_reported():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.extra, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.fc((self.extra(x) if len(x) == 2 else x).mean(dim=(2, 3)))

    report = analyze(Fickle(), [(X, Y)], PGD2)
    assert [row.weakness is None for row in report.rows] == [False, True, False]
    assert any(note.startswith("extra: ") for note in report.notes)
    assert "NaN" not in report.to_json()


def test_batches_with_an_index_are_accepted():
    plain = analyze(build("nested"), [(X, Y)], PGD2)
    assert analyze(build("nested"), [Batch(X, Y, torch.arange(6))], PGD2) == plain


def test_the_seed_decides_the_random_starts():
    attack = PGD(THREAT, step_size=0.05, steps=1)
    reports = [analyze(build("nested"), [(X, Y)], attack, seed=seed) for seed in (0, 0, 1)]
    assert weaknesses(reports[0]) == weaknesses(reports[1])
    assert weaknesses(reports[0]) != weaknesses(reports[2])


def test_each_batch_starts_its_attack_elsewhere():
    starts = []

    def attack(model, x, y, *, generator):
        starts.append(torch.rand(3, generator=generator))
        return x + NOISE

    attack.threat = THREAT
    analyze(build("backwards"), [(X, Y), (X, Y)], attack)
    assert not torch.equal(*starts)


def test_a_batch_without_images_is_passed_over():
    model, empty = build("backwards"), (X[:0], Y[:0])
    assert analyze(model, [(X[:3], Y[:3]), empty, (X[3:], Y[3:])], PGD2) == analyze(
        model, [(X[:3], Y[:3]), (X[3:], Y[3:])], PGD2
    )


def test_the_report_counts_the_parameters_of_each_layer():
    model = build("backwards")
    counted = {row.name: row.num_parameters for row in analyze(model, [(X, Y)], PGD2).rows}
    assert counted["first"] == sum(parameter.numel() for parameter in model.first.parameters())


@pytest.mark.parametrize("name", ["norm", "predecessor", "measure", "first"])
def test_unknown_choices_are_refused_by_their_name_in_a_recipe(name):
    with pytest.raises(InputError, match=rf"criticality {name}.*nothing"):
        CriticalityOptions(**{name: "nothing"})


def test_the_settings_tell_what_was_asked_for():
    report = analyze(
        build("nested"), [(X, Y)], PGD2, options=CriticalityOptions(norm="rms", exclude=("head.*",)), seed=3
    )
    expected = {"attack": "PGD-2 linf eps 0.1", "num_samples": 6, "seed": 3, "norm": "rms", "measure": "index"}
    assert expected.items() <= dict(report.settings).items()
    assert [row.name for row in report.rows] == ["stem.0.0", "blocks.a.0", "blocks.a.1"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_refused(value):
    x = X.clone()
    x[2, 0, 0, 0] = value
    with pytest.raises(InputError, match="image 2 of a batch has NaN or infinite pixels; clean the data first"):
        analyze(build("nested"), [(x, Y)], PGD2)


def test_images_out_of_range_are_refused_with_the_likely_fix():
    with pytest.raises(
        InputError, match=r"outside \[0\.0, 1\.0\]; normalisation \(mean, std\) belongs inside the model"
    ):
        analyze(build("nested"), [(2 * X - 1, Y)], PGD2)
    shifted = PGD(ThreatModel(eps=0.1, bounds=(-1.0, 1.0)), step_size=0.05, steps=1)
    analyze(build("nested"), [(2 * X - 1, Y)], shifted)


def test_no_batches_are_refused():
    with pytest.raises(InputError, match="no images to analyse: the batches are empty"):
        analyze(build("nested"), [], PGD2)


def test_an_attack_without_steps_is_described_without_them():
    assert analyze(build("nested"), [(X, Y)], Shift(0.05)).settings["attack"] == "Shift linf eps 1"


def test_a_layer_that_does_not_depend_on_the_batch_is_reported():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bias, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(x).mean(dim=(2, 3)) + self.bias(torch.ones(1, 2)))

    report = analyze(Biased(), [(X, Y)], PGD2)
    assert [row.name for row in report.rows] == ["conv", "fc"]
    assert any(note.startswith("bias: ") for note in report.notes)
