"""On linear models the best attack is known in closed form: every attack must come within 1 % of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toughen.attacks import PGD, fgsm_rs
from toughen.evaluation.autoattack import APGD, FAB, Square, TargetedAPGD, TargetedFAB
from toughen.types import Norm, ThreatModel

SIDE = 5  # pixels; every image is [1, SIDE, SIDE]
Make = Callable[[ThreatModel], Any]

BOUNDED: dict[str, Make] = {
    "fgsm": lambda threat: fgsm_rs(threat, step_size=threat.eps, random_start=False),
    "pgd": lambda threat: PGD(threat, step_size=threat.eps / 4, steps=20),
    "apgd-ce": lambda threat: APGD(threat=threat, steps=25),
    "apgd-dlr": lambda threat: APGD(threat=threat, loss="dlr", steps=25),
    "apgd-t": lambda threat: TargetedAPGD(threat=threat, targets=2, steps=25),
}
NEAREST: dict[str, Make] = {
    "fab": lambda threat: FAB(threat=threat, steps=10),
    "fab-t": lambda threat: TargetedFAB(threat=threat, steps=10),
}
SQUARE: dict[str, Make] = {"square": lambda threat: Square(threat=threat, queries=800)}


class Linear(nn.Module):
    """Logits W x + b with chosen margins z_0 - z_j at the grey image.

    The last row and the last column carry no weight: the squares of Square's published code are drawn at offsets below
    the last one, so that those pixels change only with the whole image.
    """

    def __init__(self, margins: tuple[float, ...], *, gains: tuple[float, ...] | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        weight = torch.randn(len(margins) + 1, SIDE, SIDE, generator=draw)
        weight[:, -1] = weight[:, :, -1] = 0
        if gains is not None:
            weight *= torch.tensor((1.0, *gains)).view(-1, 1, 1)
        self.weight = nn.Parameter(weight.flatten(1))
        self.margins = torch.tensor(margins)
        with torch.no_grad():
            to_rivals = (self.weight[0] - self.weight[1:]).sum(dim=1) * 0.5 - self.margins
        self.register_buffer("bias", torch.cat((torch.zeros(1), to_rivals)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def slopes(self) -> Tensor:
        """The gradients of the margins z_0 - z_j, [K - 1, SIDE^2]."""
        return (self.weight[0] - self.weight[1:]).detach()

    def distances(self, norm: Norm) -> Tensor:
        """How far each rival's region is from the images, [K - 1]: the margin over the dual norm of its gradient."""
        return self.margins / torch.linalg.vector_norm(self.slopes(), ord=1 if norm == "linf" else 2, dim=1)


def images(model: Linear, num_images: int = 2) -> tuple[Tensor, Tensor]:
    """Different images near grey, of class 0, all with the model's margins."""
    noise = torch.empty(num_images, SIDE * SIDE).uniform_(-0.03, 0.03, generator=torch.Generator().manual_seed(5))
    slopes = model.slopes()
    noise -= (noise @ slopes.T) @ torch.linalg.pinv(slopes).T  # along no margin
    return (0.5 + noise).view(num_images, 1, SIDE, SIDE), torch.zeros(num_images, dtype=torch.long)


def two_classes() -> Linear:
    return Linear((1.0,))


def likeliest_is_nearest() -> Linear:
    # far enough behind that the gradient of cross-entropy is the rival's alone
    return Linear((1.0, 40.0, 41.0, 42.0, 43.0))


def likeliest_is_farther() -> Linear:
    return Linear((1.0, 1.5, 3.0, 4.0), gains=(1.0, 5.0, 1.0, 1.0))


def margin(model: Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    return logits[:, 0] - logits[:, 1:].amax(dim=1)


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=torch.inf if norm == "linf" else 2, dim=1)
    return found


def attacked(make: Make, model: Linear, norm: Norm, eps: float) -> tuple[Tensor, Tensor]:
    x, y = images(model)
    return x, make(ThreatModel(norm=norm, eps=eps))(model, x, y, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [two_classes, likeliest_is_nearest, likeliest_is_farther])
def test_the_images_have_the_margins_of_the_closed_form(build: Callable[[], Linear]) -> None:
    model = build()
    x, _ = images(model)

    logits = model(x).detach()

    torch.testing.assert_close(logits[:, :1] - logits[:, 1:], model.margins.expand(len(x), -1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", list(BOUNDED))
def test_a_bounded_attack_takes_eps_times_the_dual_norm_from_the_margin_to_within_a_percent(
    name: str, norm: Norm
) -> None:
    model = two_classes()
    eps = 1.5 * model.distances(norm).item()  # AutoAttack's attacks return only what the model gets wrong
    x, x_adv = attacked(BOUNDED[name], model, norm, eps)

    taken = margin(model, x) - margin(model, x_adv)

    best = eps * model.margins / model.distances(norm)
    assert ((taken > 0.99 * best) & (taken < 1.0001 * best)).all(), (taken, best)
    assert (lengths(x_adv - x, norm) < eps * 1.0001).all()


@pytest.mark.parametrize("build", [two_classes, likeliest_is_nearest])
@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name in (*BOUNDED, *NEAREST) for norm in ("linf", "l2")] + [("square", "linf")],
)
def test_images_fall_just_beyond_the_smallest_radius_and_stand_just_below(
    name: str, norm: Norm, build: Callable[[], Linear]
) -> None:
    model = build()
    radius = model.distances(norm).min().item()
    make = (BOUNDED | NEAREST | SQUARE)[name]

    x, beyond = attacked(make, model, norm, 1.01 * radius)
    _, below = attacked(make, model, norm, 0.99 * radius)

    assert (margin(model, beyond) <= 0).all(), margin(model, beyond)
    assert (lengths(beyond - x, norm) < 1.01 * radius * 1.0001).all()
    assert (margin(model, below) > 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-t", *NEAREST])
def test_attacks_that_try_several_classes_find_the_nearest_one_though_another_is_likelier(
    name: str, norm: Norm
) -> None:
    model = likeliest_is_farther()
    distances = model.distances(norm)
    assert distances.argmin() == 1
    assert distances[1] < 0.5 * distances[0]
    x, beyond = attacked((BOUNDED | NEAREST)[name], model, norm, 1.01 * distances[1].item())

    assert (model(beyond).argmax(dim=1) == 2).all()
    assert (lengths(beyond - x, norm) < 1.0101 * distances[1]).all()


@pytest.mark.parametrize("build", [two_classes, likeliest_is_nearest])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", list(NEAREST))
def test_fab_finds_the_smallest_norm_to_within_a_percent_whatever_eps_allows(
    name: str, norm: Norm, build: Callable[[], Linear]
) -> None:
    model = build()
    radius = model.distances(norm).min()
    x, x_adv = attacked(NEAREST[name], model, norm, 3 * radius.item())

    found = lengths(x_adv - x, norm)

    assert ((found > 0.9999 * radius) & (found < 1.01 * radius)).all(), (found, radius)


@pytest.mark.parametrize("build", [two_classes, likeliest_is_nearest])
def test_carlini_wagner_finds_the_smallest_l2_norm_to_within_a_percent(build: Callable[[], Linear]) -> None:
    pytest.importorskip("foolbox", reason="foolbox is optional: pip install 'toughen[attacks]'")
    from toughen.evaluation.minimal import CarliniWagner

    model = build()
    radius = model.distances("l2").min()
    x, x_adv = attacked(
        lambda threat: CarliniWagner(threat=threat, steps=100, initial_const=0.1, binary_search_steps=4),
        model,
        "l2",
        0.5 * radius.item(),
    )

    found = lengths(x_adv - x, "l2")

    assert (margin(model, x_adv) <= 0).all()
    assert ((found > 0.9999 * radius) & (found < 1.01 * radius)).all(), (found, radius)
