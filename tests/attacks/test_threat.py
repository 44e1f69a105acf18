"""The geometry of the two balls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toughen.attacks.threat import BALLS, gaussian_start


def lengths(delta, norm):
    flat = delta.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


# zero, or far from where float32 loses its precision
sizes = st.one_of(st.just(0.0), st.floats(1e-6, 10.0))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["linf", "l2"]), sizes, sizes, st.integers(0, 2**31))
def test_projection_lands_in_the_ball_and_leaves_points_inside_alone(norm, radius, scale, seed):
    delta = scale * torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed))
    projected = BALLS[norm].project(delta, torch.full((5, 1, 1), radius))
    assert (lengths(projected, norm) <= radius * (1 + 1e-6)).all()
    inside = lengths(delta, norm) < radius * (1 - 1e-6)
    assert torch.equal(projected[inside], delta[inside])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_the_nearest_of_many_points_in_the_ball(norm):
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(1, 6, generator=draw)
    radius = torch.full((1, 1), 0.5)
    projected = BALLS[norm].project(delta, radius)
    others = BALLS[norm].sample(torch.zeros(500, 6), torch.full((500, 1), 0.5), draw)
    assert (delta - projected).norm() <= (delta - others).norm(dim=1).min()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steepest_step_has_length_one_and_beats_other_directions(norm):
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(1, 6, generator=draw)
    step = BALLS[norm].ascend(gradient)
    assert float(lengths(step, norm)) == pytest.approx(1)
    others = BALLS[norm].sample(torch.zeros(500, 6), torch.ones(500, 1), draw)
    assert (gradient * step).sum() >= (gradient * others).sum(dim=1).max()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_means_no_step(norm):
    assert torch.equal(BALLS[norm].ascend(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_step_has_length_one_however_small_or_large_the_gradient_and_its_neighbours(size):
    gradient = torch.stack([torch.full((2, 3), size), torch.ones(2, 3)])
    torch.testing.assert_close(lengths(BALLS["l2"].ascend(gradient), "l2"), torch.ones(2, dtype=torch.float64))


STARTS = {
    norm: lambda like, draw, ball=ball: ball.sample(like, like.new_ones(len(like), 1, 1, 1), draw)
    for norm, ball in BALLS.items()
}
STARTS["gaussian"] = gaussian_start


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_start_is_its_generators_alone_and_has_the_images_memory_format(start):
    for images in (
        torch.zeros(1, 3, 4, 4),
        torch.zeros(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last),
    ):
        found = start(images, torch.Generator().manual_seed(1))
        torch.rand(1)
        assert torch.equal(found, start(images, torch.Generator().manual_seed(1)))
        assert not torch.equal(found, start(images, torch.Generator().manual_seed(2)))
        assert (found.dtype, found.stride()) == (images.dtype, images.stride())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_samples_are_uniform_in_the_ball(norm):
    dimensions, count = 3, 20_000
    points = BALLS[norm].sample(torch.zeros(count, dimensions), torch.ones(count, 1), torch.Generator().manual_seed(0))
    length = lengths(points, norm)
    assert length.max() <= 1 + 1e-6
    # uniform in volume: the share within r is r ** dimensions
    for r in (0.3, 0.5, 0.8):
        assert float((length < r).double().mean()) == pytest.approx(r**dimensions, abs=0.015)
