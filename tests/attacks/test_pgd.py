"""PGD as a search: it reaches the closed-form optimum of linear models and never leaves ball or box."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from toughen.attacks import PGD, CrossEntropy, FeatureShift, KLToClean, Margin, fgsm_rs
from toughen.errors import InputError
from toughen.layers import ModelView
from toughen.types import Norm, ThreatModel
from zoo import build, images

X, Y = images(6)
LINF = ThreatModel(norm="linf", eps=0.1)


def linear(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A linear model of two classes whose margin for class 0 moves by ``delta . a``; and that a, [C, H, W]."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 2)).eval()
    weight = torch.randn(2, X[0].numel(), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.zero_()
    return model, (weight[1] - weight[0]).view_as(X[0])


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return Margin().bind(ModelView(model), x, y)(x)


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


@pytest.mark.parametrize("goal", [Margin(), CrossEntropy()], ids=["margin", "cross-entropy"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_closed_form_optimum_of_a_linear_model(norm, goal):
    model, a = linear()
    eps = 0.1
    attack = PGD(ThreatModel(norm=norm, eps=eps), step_size=0.05, steps=60)
    zeros = torch.zeros(len(X), dtype=torch.int64)
    gain = margins(model, attack(model, X, zeros, goal=goal), zeros) - margins(model, X, zeros)
    optimum = eps * (a.abs().sum() if norm == "linf" else a.norm())
    # the cross-entropy's gradient vanishes in float32 for samples that are far on the wrong side: not here
    torch.testing.assert_close(gain, optimum.expand(len(X)), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_long_step_reaches_the_optimum_from_any_start_in_linf_only(norm):
    model, a = linear()
    eps = 0.1
    zeros = torch.zeros(len(X), dtype=torch.int64)
    attack = fgsm_rs(ThreatModel(norm=norm, eps=eps), step_size=2 * eps)
    gain = margins(model, attack(model, X, zeros), zeros) - margins(model, X, zeros)
    if norm == "linf":
        torch.testing.assert_close(gain, (eps * a.abs().sum()).expand(len(X)), rtol=1e-5, atol=1e-5)
    else:
        assert (gain > 0.8 * eps * a.norm()).all()
        assert (gain <= 1.0001 * eps * a.norm()).all()


def test_fgsm_without_random_start_is_one_sign_step():
    model = build("nested").eval()
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), Y, reduction="sum"), x)
    fgsm = fgsm_rs(LINF, step_size=LINF.eps, random_start=False)
    expected = (X + LINF.eps * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, X, Y), expected, rtol=0, atol=1e-6)


def test_fgsm_rs_steps_by_one_and_a_quarter_eps_as_published():
    assert fgsm_rs(LINF) == PGD(LINF, step_size=0.125, steps=1)
    assert fgsm_rs(LINF, model_mode="unchanged").model_mode == "unchanged"


def test_steps_matter_and_follow_the_gradient_of_each_iterate():
    model = build("backwards").eval()
    x = X.clone()
    for _ in range(3):
        x = x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), Y, reduction="sum"), x)
        x = (X + (x.detach() + 0.04 * gradient.sign() - X).clamp(-0.1, 0.1)).clamp(0, 1)
    attack = PGD(LINF, step_size=0.04, steps=3, random_start=False)
    torch.testing.assert_close(attack(model, X, Y), x, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.just(0.0), st.floats(1e-6, 3.0)),
    step=st.floats(0.0, 4.0),
    steps=st.integers(1, 3),
    keep=st.sampled_from(["last", "worst"]),
    random_start=st.booleans(),
    seed=st.integers(0, 2**31),
    per_sample=st.booleans(),
)
def test_ball_and_box_are_always_respected(norm, eps, step, steps, keep, random_start, seed, per_sample):
    eps = min(eps, 1.0) if norm == "linf" else eps  # a larger l_inf budget is refused
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 3, 8, 8, generator=draw)
    x[0], x[1] = 0.0, 1.0  # on the faces of the box
    budget = eps * torch.rand(4, generator=draw) if per_sample and eps > 0 else None
    attack = PGD(ThreatModel(norm=norm, eps=eps), step_size=step, steps=steps, keep=keep, random_start=random_start)
    x_adv = attack(BALL_MODEL, x, Y[:4], eps=budget, generator=draw)
    radius = torch.full((4,), eps, dtype=torch.float64) if budget is None else budget.double()
    assert (lengths(x_adv - x, norm) <= radius + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad


BALL_MODEL = build("backwards").eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_other_bounds_are_respected_too(norm):
    attack = PGD(ThreatModel(norm=norm, eps=0.5, bounds=(-1.0, 1.0)), step_size=0.2, steps=4)
    x = 2 * X - 1
    x[:, :, 0] = -1.0
    x_adv = attack(BALL_MODEL, x, Y)
    assert x_adv.min() >= -1
    assert x_adv.min() < 0
    assert x_adv.max() <= 1
    assert (lengths(x_adv - x, norm) <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("keep", ["last", "worst"])
def test_eps_zero_returns_x_exactly(norm, keep):
    attack = PGD(ThreatModel(norm=norm, eps=0.0), step_size=0.1, steps=3, keep=keep)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(attack(BALL_MODEL, x, Y[:4]), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_sample_spends_its_own_budget(norm):
    model, a = linear()
    zeros = torch.zeros(len(X), dtype=torch.int64)
    budget = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 0.15])
    attack = PGD(ThreatModel(norm=norm, eps=0.05), step_size=0.02, steps=40)
    x_adv = attack(model, X, zeros, goal=Margin(), eps=budget)
    assert torch.equal(x_adv[0], X[0])
    gain = margins(model, x_adv, zeros) - margins(model, X, zeros)
    torch.testing.assert_close(gain, budget * (a.abs().sum() if norm == "linf" else a.norm()), rtol=1e-3, atol=2e-5)


def test_the_step_scales_along_with_the_budget_of_the_sample():
    attack = PGD(LINF, step_size=0.02, steps=1, random_start=False)
    budget = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.1, 0.1])
    length = lengths(attack(BALL_MODEL, X, Y, eps=budget) - X, "linf")
    torch.testing.assert_close(length, 0.2 * budget.double(), rtol=1e-5, atol=1e-7)


def test_equal_budgets_per_sample_are_the_budget_of_the_threat_model():
    attack = PGD(LINF, step_size=0.03, steps=3)
    same = attack(BALL_MODEL, X, Y, eps=torch.full((6,), LINF.eps))
    torch.testing.assert_close(attack(BALL_MODEL, X, Y), same, rtol=0, atol=1e-6)


def test_the_random_start_fills_the_ball():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    x = torch.full((200, 3, 8, 8), 0.5)
    for norm in ("linf", "l2"):
        attack = PGD(ThreatModel(norm=norm, eps=0.2), step_size=0.0, steps=1)
        delta = attack(model, x, torch.zeros(200, dtype=torch.int64)) - x
        length = lengths(delta, norm) / 0.2
        assert length.max() <= 1 + 1e-5
        assert length.min() > 0.9  # in 192 dimensions almost all of the volume is near the surface
        assert delta.mean().abs() < 0.01
        if norm == "linf":
            assert abs(float(delta.abs().mean()) / 0.2 - 0.5) < 0.02


def test_without_random_start_the_search_begins_at_x():
    attack = PGD(LINF, step_size=0.0, steps=2, random_start=False)
    assert torch.equal(attack(BALL_MODEL, X, Y), X)


@pytest.mark.parametrize("goal", [CrossEntropy(), Margin()], ids=["cross-entropy", "margin"])
def test_worst_is_at_least_as_bad_as_the_start_and_the_last(goal):
    model = build("nested", seed=3).eval()
    settings_ = {"step_size": 0.15, "steps": 5}  # steps so long that the last iterate is not always the worst

    def values(x_adv: Tensor) -> Tensor:
        with torch.no_grad():
            return goal.bind(ModelView(model), X, Y)(x_adv)

    def search(**changes: object) -> Tensor:
        draw = torch.Generator().manual_seed(5)
        return values(PGD(LINF, **(settings_ | changes))(model, X, Y, goal=goal, generator=draw))

    worst, last, start = search(keep="worst"), search(keep="last"), search(step_size=0.0)
    assert (worst >= last - 1e-6).all()
    assert (worst >= start - 1e-6).all()
    assert (worst > last + 1e-6).any()
    iterates = torch.stack([search(steps=steps) for steps in range(1, 6)] + [start])
    torch.testing.assert_close(worst, iterates.amax(dim=0), rtol=0, atol=1e-5)


def test_of_iterates_that_are_equally_bad_the_first_is_kept():
    class Level:
        def bind(self, view, x, y):
            return lambda x_adv: (x_adv - x_adv.detach()).flatten(1).sum(dim=1)

    attack = PGD(LINF, step_size=0.01, steps=3, random_start=False, keep="worst")
    assert torch.equal(attack(linear()[0], X, Y, goal=Level()), X)
    assert not torch.equal(replace(attack, keep="last")(linear()[0], X, Y, goal=Level()), X)


@pytest.mark.parametrize("keep", ["last", "worst"])
def test_restarts_are_never_worse_and_sometimes_better(keep):
    model = build("nested", seed=3).eval()

    def search(restarts: int) -> Tensor:
        attack = PGD(LINF, step_size=0.08, steps=2, restarts=restarts, keep=keep)
        x_adv = attack(model, X, Y, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x_adv), Y, reduction="none")

    one, two, many = search(1), search(2), search(6)
    assert (two >= one - 1e-6).all()
    assert (many >= two - 1e-6).all()
    assert (many > one + 1e-6).any()


def test_a_sample_without_gradient_stays_where_it_is_in_l2():
    model, _ = linear()

    class Flat(nn.Module):
        """Ignores the first sample."""

        def forward(self, x: Tensor) -> Tensor:
            return model(x * torch.arange(len(x)).clamp(max=1).view(-1, 1, 1, 1))

    attack = PGD(ThreatModel(norm="l2", eps=0.5), step_size=0.1, steps=3, random_start=False)
    x_adv = attack(Flat(), X, Y.clamp(max=1), goal=Margin())
    assert torch.equal(x_adv[0], X[0])
    assert (lengths(x_adv - X, "l2")[1:] > 0.29).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal", [CrossEntropy(), KLToClean(), FeatureShift(layers=("blocks.a.0",))], ids=repr)
def test_more_steps_push_the_goal_further_than_the_random_start(norm, goal):
    model = build("nested").eval()
    with torch.no_grad():
        model.head.fc.weight.mul_(30)  # a divergence far above rounding
    threat = ThreatModel(norm=norm, eps=0.1)
    objective = goal.bind(ModelView(model), X, Y)
    with torch.no_grad():
        start = objective(PGD(threat, step_size=0.0, steps=1)(model, X, Y, goal=goal))
        end = objective(PGD(threat, step_size=0.025, steps=10)(model, X, Y, goal=goal))
    assert (end > start).all()


def test_a_generator_makes_it_deterministic_and_moves_on():
    attack = PGD(LINF, step_size=0.03, steps=2)
    draws = [torch.Generator().manual_seed(7) for _ in range(2)]
    first = attack(BALL_MODEL, X, Y, generator=draws[0])
    assert torch.equal(first, attack(BALL_MODEL, X, Y, generator=draws[1]))
    assert not torch.equal(first, attack(BALL_MODEL, X, Y, generator=draws[0]))


def test_without_a_generator_it_follows_torchs_global_state():
    attack = PGD(LINF, step_size=0.03, steps=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, again = attack(BALL_MODEL, X, Y), attack(BALL_MODEL, X, Y)
        torch.manual_seed(1)
        other = attack(BALL_MODEL, X, Y)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_works_under_no_grad():
    attack = PGD(LINF, step_size=0.05, steps=3)
    with torch.no_grad():
        inside = attack(BALL_MODEL, X, Y)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, attack(BALL_MODEL, X, Y))


def test_the_attack_does_not_write_into_the_images():
    x = X.clone().requires_grad_(True)
    PGD(LINF, step_size=0.03, steps=2)(BALL_MODEL, x, Y)
    assert torch.equal(x, X)
    assert x.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": -0.1}, r"step_size is -0\.1; it must be a finite number >= 0"),
        ({"step_size": float("nan")}, r"step_size is nan; it must be a finite number >= 0"),
        ({"steps": 0}, r"attack steps is 0; it must be a whole number, at least 1"),
        ({"steps": 2.5}, r"attack steps is 2\.5; it must be a whole number, at least 1"),
        ({"step_size": "2/255"}, r"step_size is '2/255'; it must be a finite number"),
        ({"restarts": 0}, r"attack restarts is 0; it must be a whole number, at least 1"),
        ({"keep": "best"}, r"attack keep is 'best'; allowed: last, worst"),
        ({"model_mode": "train"}, r"attack model_mode is 'train'; allowed: eval, unchanged"),
        ({"restarts": 2, "random_start": False}, r"2 restarts without random_start would all be the same"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PGD(LINF, **({"step_size": 0.1} | changes))


def test_budgets_per_sample_need_a_scale():
    attack = PGD(ThreatModel(eps=0.0), step_size=0.1)
    with pytest.raises(InputError, match="a budget per sample needs a threat model with eps > 0"):
        attack(BALL_MODEL, X, Y, eps=torch.ones(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, r"eps is -0\.1; it must be a finite number >= 0, in pixel units of \[0, 1\]"),
        ({"eps": float("inf")}, r"eps is inf; it must be a finite number"),
        ({"eps": 0.1, "norm": "l1"}, r"unknown norm 'l1'; allowed: linf, l2"),
        ({"eps": 0.1, "bounds": (1.0, 0.0)}, r"bounds are \(1\.0, 0\.0\); the first must be below the second"),
    ],
)
def test_impossible_threat_models_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ThreatModel(**changes)


def test_an_l_inf_budget_beyond_the_range_of_pixels_is_refused_with_the_likely_meaning():
    with pytest.raises(InputError, match=r"eps is 8, more than the whole range .*did you mean 8/255\?"):
        ThreatModel(norm="linf", eps=8)
    assert ThreatModel(norm="linf", eps=8, bounds=(0, 255)).eps == 8
    assert ThreatModel(norm="l2", eps=8).eps == 8


def test_a_given_start_is_where_the_search_begins():
    model, a = linear()
    attack = PGD(LINF, step_size=0.02, steps=1)
    y, start = torch.zeros(len(X), dtype=torch.long), (X + 0.05).clamp(0, 1)
    expected = (X + (start + 0.02 * a.sign() - X).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(attack(model, X, y, start=start), expected)


def test_a_start_outside_the_ball_is_never_returned():
    model, a = linear()
    y = torch.zeros(len(X), dtype=torch.long)
    attack = PGD(ThreatModel(eps=0.01), step_size=0.0, steps=1, keep="worst")
    delta = attack(model, X, y, start=X + a.sign()) - X
    assert float(delta.abs().max()) <= 0.01 + 1e-6
