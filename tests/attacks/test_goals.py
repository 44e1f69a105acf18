"""Goals: what each of them scores, and that stopping early changes no perturbation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from toughen.attacks import PGD, CrossEntropy, FeatureShift, KLToClean, Margin
from toughen.attacks.goals import feature_distance
from toughen.errors import InputError
from toughen.layers import ModelView, map_layers
from toughen.types import ThreatModel
from zoo import ZOO, build, images

X, Y = images(5)
X_ADV = (X + 0.05 * torch.randn(X.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)
LINF = ThreatModel(eps=0.1)


def sharp(seed=0):
    """A network whose divergences are far above rounding."""
    model = build("nested", seed=seed).eval()
    with torch.no_grad():
        model.head.fc.weight.mul_(30)
    return model


def score(goal, model, x=X, y=Y, x_adv=X_ADV):
    with torch.no_grad():
        return goal.bind(ModelView(model), x, y)(x_adv)


def test_cross_entropy_is_that_of_each_sample():
    model = build("nested").eval()
    assert torch.equal(score(CrossEntropy(), model), F.cross_entropy(model(X_ADV), Y, reduction="none"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_margin_is_positive_exactly_where_the_model_errs(seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 4, generator=draw)
    y = torch.randint(4, (50,), generator=draw)
    margin = score(Margin(), torch.nn.Identity(), logits, y, logits)
    assert torch.equal(margin > 0, logits.argmax(dim=1) != y)
    two_best = logits.topk(2, dim=1).values
    assert torch.equal(margin[margin < 0], (two_best[:, 1] - two_best[:, 0])[margin < 0])


def test_kl_is_zero_at_x_and_positive_elsewhere():
    model = sharp()
    assert torch.equal(score(KLToClean(), model, x_adv=X), torch.zeros(5))
    assert (score(KLToClean(), model) > 0).all()


def test_kl_is_the_divergence_from_clean_to_perturbed():
    draw = torch.Generator().manual_seed(2)
    clean, moved = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    log_p, log_q = clean.log_softmax(dim=1), moved.log_softmax(dim=1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1)
    torch.testing.assert_close(score(KLToClean(), torch.nn.Identity(), clean, Y, moved), expected)


def test_feature_shift_adds_the_lengths_over_layers():
    model = build("backwards").eval()
    view = ModelView(model)
    clean = view.features(X, ["first", "third"]).values
    moved = view.features(X_ADV, ["first", "third"]).values
    expected = sum((moved[name] - clean[name]).flatten(1).norm(dim=1) for name in clean)
    torch.testing.assert_close(score(FeatureShift(layers=("first", "third")), model), expected)


def test_feature_shift_sees_features_before_an_in_place_change():
    model = build("in_place").eval()
    expected = (model.conv(X_ADV) - model.conv(X)).flatten(1).norm(dim=1)
    torch.testing.assert_close(score(FeatureShift(layers=("conv",)), model), expected)


def test_feature_shift_needs_a_layer():
    with pytest.raises(InputError, match="FeatureShift needs at least one layer"):
        FeatureShift(layers=())


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("norm", ["l2", "squared", "rms", "dim", "relative"])
def test_distances_follow_their_formulas(norm, count):
    draw = torch.Generator().manual_seed(4)
    moved, clean = (0.1 * torch.randn(count, 3, 4, 2, generator=draw) for _ in range(2))
    length = (moved - clean).flatten(1).norm(dim=1)
    expected = {
        "l2": length,
        "squared": length**2,
        "rms": length / math.sqrt(24),
        "dim": length / 24,
        "relative": length / clean.flatten(1).norm(dim=1),
    }[norm]
    torch.testing.assert_close(feature_distance(moved, clean, norm=norm), expected)


@pytest.mark.parametrize("norm", ["l2", "squared", "rms", "dim", "relative"])
def test_the_gradient_at_zero_distance_is_zero_and_finite(norm):
    clean = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))
    moved = clean.clone().requires_grad_(True)
    feature_distance(moved, clean, norm=norm).sum().backward()
    assert torch.equal(moved.grad, torch.zeros(3, 7))


def test_half_precision_features_are_measured_in_full_precision():
    clean = torch.zeros(1, 4096, dtype=torch.float16)
    moved = torch.full((1, 4096), 10.0, dtype=torch.float16)  # its sum of squares overflows in half precision
    assert feature_distance(moved, clean, norm="squared").item() == 409600.0


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """The first layer alone, and all together, of each network."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in ZOO:
        layers = [layer.name for layer in map_layers(build(name), X[:1]).selectable]
        found += [(name, (layers[0],)), (name, tuple(layers))]
    return found


@pytest.mark.parametrize(("name", "layers"), cases(), ids=lambda v: v if isinstance(v, str) else str(len(v)))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_truncated_and_full_forwards_give_bit_the_same_perturbation(name, layers, norm):
    model = build(name).eval()
    attack = PGD(ThreatModel(norm=norm, eps=0.1), step_size=0.04, steps=2)
    truncated, full = (
        attack(
            model,
            X,
            Y,
            goal=FeatureShift(layers=layers, stop_early=stop_early),
            generator=torch.Generator().manual_seed(0),
        )
        for stop_early in (True, False)
    )
    assert torch.equal(truncated, full)
    assert not torch.equal(truncated, X)


def test_what_follows_the_deepest_layer_is_left_out_unless_it_is_asked_for():
    model = build("nested").eval()
    runs = []
    model.head.register_forward_hook(lambda *_: runs.append(None))
    for stop_early, forwards in ((True, 0), (False, 2)):  # of the clean images, and of the perturbed ones
        score(FeatureShift(layers=("stem.0.0",), stop_early=stop_early), model)
        assert len(runs) == forwards


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_layers_length_and_its_square_give_the_same_sign_trajectory(steps):
    model = build("nested").eval()
    found = [
        PGD(LINF, step_size=0.03, steps=steps)(
            model,
            X,
            Y,
            goal=FeatureShift(layers=("blocks.a.1",), norm=norm),
            generator=torch.Generator().manual_seed(0),
        )
        for norm in ("l2", "squared")
    ]
    assert torch.equal(*found)


def test_two_layers_length_and_squares_give_different_perturbations():
    model = build("nested").eval()
    found = [
        PGD(LINF, step_size=0.03, steps=5)(
            model,
            X,
            Y,
            goal=FeatureShift(layers=("stem.0.0", "blocks.a.1"), norm=norm),
            generator=torch.Generator().manual_seed(0),
        )
        for norm in ("l2", "squared")
    ]
    assert not torch.equal(*found)
