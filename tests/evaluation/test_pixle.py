"""Pixle: copies pixels of the image to other places until the label changes, as the published loop does."""

import pytest
import torch
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen.errors import InputError
from toughen.evaluation.pixle import Pixle
from zoo import EVERY, build, images

X, Y = images(6)
SHORT = Pixle(x_dims=(1, 3), y_dims=(2, 4), restarts=3, iterations=4)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def p_true(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).softmax(dim=1).gather(1, y[:, None]).squeeze(1)


def network(*, channels: int = 3, scale: float = 1.0) -> nn.Module:
    """A network for images of any size whose labels of noise images are not all the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 4),
        ).eval()
    with torch.no_grad():
        model[-1].bias.zero_()
        model[-1].weight.mul_(scale)
    return model


def noise(count: int, *size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


def published_loop(attack: Pixle, model: nn.Module, x: Tensor, y: Tensor, at: int, generator: torch.Generator):
    """Run the published loop for image ``at`` alone, with the random numbers that the batch attack draws for it."""
    image, label = x[at], int(y[at])
    height, width = image.shape[-2:]
    n = attack.x_dims[1] * attack.y_dims[1]

    def judge(candidate):
        p = model(candidate[None]).softmax(dim=1)[0]
        return float(p[label]), int(p.argmax()) != label

    best_image = best = image.clone()
    best_p, wrong = judge(image)
    for _ in range(attack.restarts):
        for _ in range(attack.iterations):
            if wrong:
                return best
            patch = torch.rand(len(x), 4, 1, generator=generator)[at, :, 0]
            places = torch.rand(len(x), 2, n, generator=generator)[at]
            top, left = int(patch[0] * height), int(patch[1] * width)
            tall = attack.y_dims[0] + int(patch[2] * (attack.y_dims[1] - attack.y_dims[0] + 1))
            wide = attack.x_dims[0] + int(patch[3] * (attack.x_dims[1] - attack.x_dims[0] + 1))
            candidate, moved = best_image.clone(), 0
            for row in range(top, min(top + tall, height)):
                for column in range(left, min(left + wide, width)):
                    to_row, to_column = int(places[0, moved] * height), int(places[1, moved] * width)
                    candidate[:, to_row, to_column] = image[:, row, column]
                    moved += 1
            p, wrong = judge(candidate)
            if wrong or p < best_p:
                best_p, best = p, candidate
        best_image = best
    return best


@pytest.mark.parametrize("size", [(3, 12, 12), (1, 7, 16), (3, 16, 5)], ids=str)
def test_a_batch_equals_the_published_loop_on_each_image(size):
    model = network(channels=size[0], scale=3.0).double()
    x = noise(8, *size).double()
    y = predicted(model, x)
    attack = Pixle(x_dims=(1, 6), y_dims=(2, 5), restarts=4, iterations=5)

    x_adv = attack(model, x, y, generator=draws(3))

    with torch.no_grad():
        expected = [published_loop(attack, model, x, y, at, draws(3)) for at in range(len(x))]
    assert torch.equal(x_adv, torch.stack(expected))
    assert (x_adv != x).any()


def test_some_images_fall_and_some_stand_and_only_the_fallen_change_their_label():
    model = network(scale=3.0)
    x = noise(16, 3, 12, 12)
    y = predicted(model, x)
    weak = Pixle(x_dims=(1, 2), y_dims=(1, 2), restarts=2, iterations=3)
    strong = Pixle(restarts=20, iterations=10)
    few, many = ((predicted(model, attack(model, x, y, generator=draws())) != y).sum() for attack in (weak, strong))
    assert 0 <= few < many <= 16


@pytest.mark.parametrize("name", ["normed", "attention"])
def test_the_probability_of_the_true_class_falls_or_the_label_changes(name):
    model = build(name).eval()
    y = predicted(model, X)
    x_adv = SHORT(model, X, y, generator=draws())
    before, after = p_true(model, X, y), p_true(model, x_adv, y)
    changed = (x_adv != X).flatten(1).any(dim=1)
    assert ((after < before) | (predicted(model, x_adv) != y) | ~changed).all()
    assert changed.any()


def test_every_pixel_is_one_of_the_same_image_with_all_its_channels():
    model = network()
    x = noise(5, 3, 9, 14)
    x_adv = SHORT(model, x, predicted(model, x), generator=draws())
    for original, perturbed in zip(x, x_adv, strict=True):
        known = {tuple(pixel) for pixel in original.flatten(1).T.tolist()}
        assert {tuple(pixel) for pixel in perturbed.flatten(1).T.tolist()} <= known
    assert (x_adv != x).any()


def test_one_restart_changes_no_more_pixels_than_the_largest_patch_has():
    model = network()
    x = noise(12, 3, 16, 16)
    y = predicted(model, x)
    one = Pixle(x_dims=(2, 3), y_dims=(2, 4), restarts=1, iterations=20)(model, x, y, generator=draws())
    four = Pixle(x_dims=(2, 3), y_dims=(2, 4), restarts=4, iterations=5)(model, x, y, generator=draws())
    changed = [(x_adv != x).any(dim=1).flatten(1).sum(dim=1) for x_adv in (one, four)]
    assert 0 < changed[0].max() <= 12
    assert 12 < changed[1].max() <= 48  # restarts build on each other


def test_a_patch_larger_than_the_image_is_cut_off_at_the_border():
    model = network(channels=1)
    x = noise(4, 1, 3, 2)
    x_adv = Pixle(x_dims=(10, 10), y_dims=(10, 10), restarts=2, iterations=5)(
        model, x, predicted(model, x), generator=draws()
    )
    assert x_adv.shape == x.shape
    assert (x_adv != x).any()


class Shown(nn.Module):
    """Remembers the images that it is shown, and says 0 of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], dim=1)


def test_without_any_improvement_every_candidate_starts_from_the_image_itself_and_it_is_returned():
    model, x = Shown(), noise(3, 3, 10, 10)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(Pixle(x_dims=(2, 2), y_dims=(2, 2))(model, x, zeros, generator=draws()), x)
    changed = [(seen != x).any(dim=1).flatten(1).sum(dim=1).max() for seen in model.seen]
    assert len(model.seen) == 1 + 20 * 10
    assert max(changed) <= 4


def test_all_of_the_image_is_a_possible_origin_and_a_possible_destination():
    model, x = Shown(), torch.arange(20.0).div(20).view(1, 1, 4, 5)
    Pixle(x_dims=(1, 1), y_dims=(1, 1), restarts=40, iterations=40)(
        model, x, torch.zeros(1, dtype=torch.int64), generator=draws()
    )
    candidates = torch.cat(model.seen)
    moved = candidates != x
    assert moved.flatten(1).any(dim=0).all()
    assert set(candidates[moved].tolist()) == set(x.flatten().tolist())


def test_an_image_that_has_fallen_is_not_shown_to_the_model_again():
    model, x = Shown(), noise(5, 3, 8, 8)
    y = torch.tensor([0, 1, 0, 1, 1])  # the model says 0
    x_adv = Pixle(restarts=1, iterations=2)(model, x, y, generator=draws())
    assert [len(seen) for seen in model.seen] == [5, 2, 2]
    assert torch.equal(x_adv, x)


def test_what_happens_to_an_image_does_not_depend_on_which_others_have_fallen():
    model = network(scale=3.0).double()
    x = noise(6, 3, 12, 12).double()
    y = predicted(model, x)
    together = SHORT(model, x, y, generator=draws())
    y[1:5] = (y[1:5] + 1) % 4  # these drop out at once
    apart = SHORT(model, x, y, generator=draws())
    assert torch.equal(together[[0, 5]], apart[[0, 5]])
    assert torch.equal(apart[1:5], x[1:5])


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    model = network()
    x = noise(4, 3, 10, 10)
    y = predicted(model, x)
    first, again, other = (SHORT(model, x, y, generator=draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_changed_label_counts_even_where_the_true_class_became_more_probable():
    original = noise(1, 3, 6, 6)

    class Overtaken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            changed = (x != original).flatten(1).any(dim=1, keepdim=True)
            return torch.where(changed, torch.tensor([1.0, 1.1, -5.0]), torch.tensor([0.1, 0.0, 0.0]))

    x_adv = Pixle()(Overtaken(), original, torch.tensor([0]), generator=draws())
    assert predicted(Overtaken(), x_adv).tolist() == [1]


@pytest.mark.parametrize("name", EVERY)
def test_pixle_leaves_the_model_as_found(name):
    model = build(name)
    disturb(model)
    attack = Pixle(x_dims=(1, 2), y_dims=(1, 2), restarts=1, iterations=2)
    with left_as_found(model):
        x_adv = attack(model, X, Y, generator=draws())
    assert not x_adv.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x_dims": (0, 4)}, r"Pixle x_dims is \(0, 4\); .* >= 1 in this order"),
        ({"y_dims": (5, 4)}, r"Pixle y_dims is \(5, 4\); .*smallest and the largest"),
        ({"x_dims": (0.1, 0.2)}, r"x_dims is \(0.1, 0.2\); .*whole numbers"),
        ({"y_dims": (3,)}, r"y_dims is \(3,\); .*two whole numbers"),
        ({"restarts": 0}, "Pixle restarts is 0; it must be at least 1"),
        ({"iterations": -1}, "Pixle iterations is -1; it must be at least 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Pixle(**settings)
