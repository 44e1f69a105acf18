"""StAdv: moves pixels along a smooth flow; as strong as the published search, exact where nothing moves."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen.attacks import Margin
from toughen.errors import InputError
from toughen.evaluation import stadv
from toughen.evaluation.stadv import StAdv, flow_loss, warp
from toughen.layers import ModelView
from zoo import EVERY, build, images

X, Y = images(6)
DRAWS = torch.Generator()


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def random_flow(count: int, height: int, width: int, *, size: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return size * (2 * torch.rand(count, 2, height, width, generator=draw) - 1)


class EdgeFinder(nn.Module):
    """Says 1 where column 4 is brighter than column 3, else 0: an edge there flips it when it moves by one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        contrast = 4 * (x[..., 4] - x[..., 3]).mean(dim=(1, 2)) - 0.5
        return torch.stack([-contrast, contrast], dim=1)


def edges(at: int, count: int = 2) -> Tensor:
    """Images that are dark left of column ``at`` and bright from there on."""
    return torch.full((count, 3, 8, 8), 0.2).index_fill(3, torch.arange(at, 8), 0.8)


def smooth_network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 3))
    return model.double().requires_grad_(False)


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 5, 9), (2, 1, 6), (1, 1, 1)], ids=str)
def test_no_flow_is_exactly_the_image(size):
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(warp(x, torch.zeros(2, 2, *size[1:])), x)


def test_a_flow_of_one_pixel_is_exactly_a_shift():
    flow = torch.zeros(len(X), 2, 8, 8)
    flow[:, 0] = 1.0
    right = warp(X, flow)
    assert torch.equal(right[..., :-1], X[..., 1:])
    assert torch.equal(right[..., -1], X[..., -1])  # from outside comes the border
    down = warp(X, -flow.flip(1))
    assert torch.equal(down[..., 1:, :], X[..., :-1, :])
    assert torch.equal(down[..., 0, :], X[..., 0, :])


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_flows_in_between_are_sampled_bilinearly(size):
    x, flow = X[:, :, :5].double(), random_flow(len(X), 5, 8, size=size).double()
    identity = F.affine_grid(torch.eye(2, 3).double().repeat(len(x), 1, 1), list(x.shape), align_corners=True)
    grid = identity + flow.permute(0, 2, 3, 1) / torch.tensor([3.5, 2.0])
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(warp(x, flow), expected)


def test_at_whole_pixels_the_derivative_is_the_difference_to_the_next_pixel():
    flow = torch.zeros(len(X), 2, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(warp(X, flow).sum(), flow)
    to_right, down = X.diff(dim=3).sum(dim=1), X.diff(dim=2).sum(dim=1)
    torch.testing.assert_close(gradient[:, 0], torch.cat([to_right, to_right[..., -1:]], dim=2))
    torch.testing.assert_close(gradient[:, 1], torch.cat([down, down[:, -1:]], dim=1))


def test_half_precision_images_stay_half_precision():
    x = X.bfloat16()
    assert torch.equal(warp(x, torch.zeros(len(x), 2, 8, 8)), x)
    assert warp(x, random_flow(len(x), 8, 8, size=1.0)).dtype == torch.bfloat16


def test_the_flow_loss_of_a_constant_flow_is_zero_and_so_is_its_gradient():
    flow = torch.full((2, 2, 5, 7), 3.3, requires_grad=True)
    loss = flow_loss(flow)
    assert loss.tolist() == [0, 0]
    assert not torch.autograd.grad(loss.sum(), flow)[0].any()


def test_the_flow_loss_sums_the_distances_to_all_four_neighbours():
    flow = random_flow(1, 4, 5, size=1.0).double()
    expected = 0.0
    for row in range(4):
        for column in range(5):
            for r, c in [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]:
                if 0 <= r < 4 and 0 <= c < 5:
                    apart = (flow[0, :, row, column] - flow[0, :, r, c]).norm().item()
                    expected += math.sqrt(apart**2 + 1e-8) - 1e-4
    assert flow_loss(flow).item() == pytest.approx(expected, rel=1e-9)


def test_an_edge_that_has_to_move_by_a_pixel_is_moved_and_only_as_far_as_the_bound_allows():
    model = EdgeFinder()
    x, y = edges(4), torch.tensor([1, 1])
    assert predicted(model, x).tolist() == [1, 1]
    wide, narrow = (StAdv(bound=bound, steps=60, step_size=0.03) for bound in (0.3, 0.1))
    assert predicted(model, wide(model, x, y, generator=DRAWS)).tolist() == [0, 0]
    assert predicted(model, narrow(model, x, y, generator=DRAWS)).tolist() == [1, 1]


@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_the_flow_respects_the_bound_and_the_image_its_range(bound):
    model = build("backwards").eval()
    x = X[:, :, :7]
    attack = StAdv(bound=bound, tau=0.0, kappa=100.0, steps=20, step_size=0.05)
    flow = attack.flow(model, x, Y)
    assert flow[:, 0].abs().amax() == pytest.approx(bound * 3.5)
    assert flow[:, 1].abs().amax() == pytest.approx(bound * 3.0)
    x_adv = attack(model, x, Y, generator=DRAWS)
    assert torch.equal(x_adv, warp(x, flow))
    assert (x_adv.amax(dim=(2, 3)) <= x.amax(dim=(2, 3))).all()
    assert (x_adv.amin(dim=(2, 3)) >= x.amin(dim=(2, 3))).all()


def test_without_a_bound_pixels_go_further():
    model = build("backwards").eval()
    flow = StAdv(bound=None, tau=0.0, kappa=100.0, steps=20, step_size=0.05).flow(model, X, Y)
    assert flow.abs().amax() > 1


@pytest.mark.parametrize("tau", [0.0, 0.02])
def test_of_all_flows_on_the_way_that_fool_the_smoothest_is_returned(tau, monkeypatch):
    model, x = smooth_network(0), images(8, size=(1, 8, 8))[0].double()
    y = predicted(model, x)
    roughness, fools = [], []

    def watched(flow: Tensor) -> Tensor:
        roughness.append(flow_loss(flow.detach()))
        fools.append(predicted(model, warp(x, flow.detach())) != y)
        return flow_loss(flow)

    monkeypatch.setattr(stadv, "flow_loss", watched)
    flow = StAdv(tau=tau, bound=0.2, steps=40).flow(model, x, y)
    seen = torch.stack(roughness).where(torch.stack(fools), math.inf).amin(dim=0)
    assert len(roughness) == 41
    assert seen.isfinite().sum() >= 4
    torch.testing.assert_close(flow_loss(flow)[seen.isfinite()], seen[seen.isfinite()])


def test_an_image_that_cannot_be_broken_comes_closest_to_it():
    model, x, y = EdgeFinder(), edges(4), torch.tensor([1, 1])
    contrast = model(StAdv(bound=0.1, tau=0.0, steps=40)(model, x, y, generator=DRAWS))[:, 1]
    # columns 3 and 4 fetch from 0.35 pixels further, at most
    torch.testing.assert_close(contrast, torch.full((2,), 4 * 0.6 * (1 - 0.35) - 0.5), rtol=0, atol=1e-3)


def test_images_that_are_wrong_already_or_that_nothing_changes_are_returned_as_they_are():
    x = torch.cat([edges(4, 1), torch.full((1, 3, 8, 8), 0.5)])
    wrong_and_flat = torch.tensor([0, 0])
    assert torch.equal(StAdv(steps=5)(EdgeFinder(), x, wrong_and_flat, generator=DRAWS), x)


def test_kappa_asks_for_a_margin():
    model, x = smooth_network(0), images(8, size=(1, 8, 8))[0].double()
    y = predicted(model, x)
    margin = Margin().bind(ModelView(model), x, y)
    plain, confident = (
        margin(StAdv(tau=0.02, bound=0.2, kappa=kappa)(model, x, y, generator=DRAWS)) for kappa in (0.0, 0.1)
    )
    assert ((plain > 0) & (plain < 0.1)).all()
    assert ((confident > 0.1) & (confident < 0.2)).all()


def published_search(model: nn.Module, x: Tensor, y: int, *, tau: float, bound: float) -> float:
    """Minimise the paper's objective for one image by L-BFGS-B; return its smallest value where the model errs."""
    height, width = x.shape[-2:]
    half = torch.tensor([(width - 1) / 2, (height - 1) / 2]).double()
    identity = F.affine_grid(torch.eye(2, 3).double()[None], [1, *x.shape], align_corners=True)
    smallest = math.inf

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal smallest
        share = torch.from_numpy(values).view(1, height, width, 2).requires_grad_(True)
        z = model(F.grid_sample(x[None], identity + share, padding_mode="border", align_corners=True))[0]
        margin = z[y] - torch.cat([z[:y], z[y + 1 :]]).max()
        flow = share[0] * half
        roughness = sum(
            2 * ((d.square().sum(dim=2) + 1e-8).sqrt() - 1e-4).sum() for d in (flow.diff(dim=0), flow.diff(dim=1))
        )
        loss = margin.clamp_min(0) + tau * roughness
        if margin < 0:
            smallest = min(smallest, loss.item())
        return loss.item(), torch.autograd.grad(loss, share)[0].flatten().numpy()

    size = 2 * height * width
    settings = {"maxcor": 20, "maxiter": 60}
    start = np.zeros(size)
    scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=[(-bound, bound)] * size, options=settings
    )
    return smallest


def test_it_fools_wherever_the_published_search_does_and_reaches_as_small_an_objective():
    tau, bound = 0.02, 0.2
    model, x = smooth_network(0), images(8, size=(1, 8, 8))[0].double()
    y = predicted(model, x)
    flow = StAdv(tau=tau, bound=bound).flow(model, x, y)
    ours = torch.where(predicted(model, warp(x, flow)) != y, tau * flow_loss(flow), math.inf)
    pairs = zip(x, y.tolist(), strict=True)
    published = torch.tensor([published_search(model, *pair, tau=tau, bound=bound) for pair in pairs]).double()
    assert published.isfinite().sum() >= 4
    assert (ours <= 1.05 * published + 0.01).all()


def test_each_image_is_searched_alone():
    model, x = smooth_network(1), images(5, size=(1, 8, 8))[0].double()
    y = predicted(model, x)
    attack = StAdv(steps=30)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], generator=DRAWS) for i in range(5)])
    torch.testing.assert_close(attack(model, x, y, generator=DRAWS), alone)


def test_the_search_is_deterministic_and_draws_nothing():
    model = build("normed").eval()
    draws = torch.Generator().manual_seed(0)
    first = StAdv(steps=5)(model, X, Y, generator=draws)
    assert torch.equal(first, StAdv(steps=5)(model, X, Y, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(draws.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize("name", EVERY)
def test_stadv_leaves_the_model_as_found(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        x_adv = StAdv(steps=2)(model, X, Y, generator=DRAWS)
    assert not x_adv.requires_grad


def test_a_model_that_overflows_loses_no_pixel():
    class Overflows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum(dim=(1, 2, 3)), (x * float("inf")).sum(dim=(1, 2, 3))], dim=1)

    assert StAdv(steps=3)(Overflows(), X, torch.zeros_like(Y), generator=DRAWS).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -1.0}, "StAdv tau is -1.0; it must be a finite number >= 0"),
        ({"kappa": math.nan}, "StAdv kappa is nan; it must be a finite number >= 0"),
        ({"bound": 0.0}, "StAdv bound is 0.0; .*> 0, as a share of half the image, or None"),
        ({"steps": 0}, "StAdv steps is 0; it must be at least 1"),
        ({"step_size": math.inf}, "StAdv step_size is inf; .*finite number > 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        StAdv(**settings)
