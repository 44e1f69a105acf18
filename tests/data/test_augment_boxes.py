"""Cutout, erase and resized_crop: boxes and what is done with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from toughen import rng
from toughen.data.augment import Cutout, Erase, ResizedCrop


def white(batch: int, height: int, width: int) -> Tensor:
    return torch.full((batch, 1, height, width), 255, dtype=torch.uint8)


def blanked(images: Tensor) -> Tensor:
    """The box of zeros of each image, [B, 4]: top, left, height, width; asserts that the zeros are a box."""
    zero = (images == 0).all(dim=1)
    rows, cols = zero.any(dim=2), zero.any(dim=1)
    top, left = rows.int().argmax(dim=1), cols.int().argmax(dim=1)
    tall, wide = rows.sum(dim=1), cols.sum(dim=1)
    assert torch.equal(zero.sum(dim=(1, 2)), tall * wide)
    assert bool(((images == 0) | (images == 255)).all())
    return torch.stack([top, left, tall, wide], dim=1)


def assert_within(sides: Tensor, area: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Area and height over width lie in their ranges, for some sides that round to these [N, 2]."""
    tall, wide = sides.double().T
    assert bool(((tall + 0.5) * (wide + 0.5) >= scale[0] * area).all())
    assert bool(((tall - 0.5) * (wide - 0.5) <= scale[1] * area).all())
    assert bool(((tall + 0.5) / (wide - 0.5) >= ratio[0]).all())
    assert bool(((tall - 0.5) / (wide + 0.5) <= ratio[1]).all())


def assert_same_distribution(a: Tensor, b: Tensor) -> None:
    """Means of the columns of two samples [N, 4] and [M, 4] agree within 4 standard errors; so do those of squares."""
    for power in (1, 2):
        x, y = a.double() ** power, b.double() ** power
        error = (x.var(dim=0) / len(x) + y.var(dim=0) / len(y)).sqrt()
        assert bool(((x.mean(dim=0) - y.mean(dim=0)).abs() < 4 * error).all())


@given(seed=st.integers(0, 10_000), size=st.integers(1, 12), height=st.integers(1, 9), width=st.integers(1, 9))
def test_cutout_blanks_a_square_clipped_at_the_border(seed: int, size: int, height: int, width: int) -> None:
    boxes = blanked(Cutout(size)(white(4, height, width), rng.generator(seed, "test")))
    for top, left, tall, wide in boxes.tolist():
        assert tall == size or top == 0 or top + tall == height
        assert wide == size or left == 0 or left + wide == width
        assert tall >= min(height, (size + 1) // 2)  # the centre is inside
        assert wide >= min(width, (size + 1) // 2)


def test_cutout_centres_are_uniform_over_the_image() -> None:
    count = 4000
    boxes = blanked(Cutout(1)(white(count, 4, 5), rng.generator(0, "test")))
    places = (boxes[:, 0] * 5 + boxes[:, 1]).bincount(minlength=20)
    assert bool(((places - count / 20).abs() < 4 * (count / 20) ** 0.5).all())


def test_erase_blanks_one_box_of_an_allowed_area_and_shape_on_about_the_share_of_images_it_says() -> None:
    count, height, width = 4000, 24, 40
    boxes = blanked(Erase(p=0.3)(white(count, height, width), rng.generator(0, "test")))
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) - 0.3 * count) < 4 * (count * 0.3 * 0.7) ** 0.5
    assert_within(erased[:, 2:], height * width, (0.02, 0.33), (0.3, 3.3))


@pytest.mark.parametrize(("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.3, 1.0), (0.1, 10.0))])
def test_erase_draws_boxes_as_torchvision_does(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    boxes = blanked(Erase(p=1, scale=scale, ratio=ratio)(white(4000, 24, 40), rng.generator(0, "test")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.zeros(1, 24, 40)
        drawn = [transforms.RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(2500)]
    theirs = torch.tensor([box if box[2] < 24 else (0, 0, 0, 0) for box in drawn])  # the whole image: not erased
    assert_same_distribution(boxes, theirs)


def test_images_in_which_no_box_fits_stay_as_they_are() -> None:
    images = white(50, 8, 8)
    assert torch.equal(Erase(p=1, scale=(1, 1))(images, rng.generator(0, "test")), images)


@given(seed=st.integers(0, 10_000), height=st.integers(1, 60), width=st.integers(1, 60))
def test_every_box_of_resized_crop_lies_inside_the_image(seed: int, height: int, width: int) -> None:
    boxes = ResizedCrop().boxes(8, height, width, rng.generator(seed, "test"))
    top, left, tall, wide = boxes.T
    assert bool(((top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1)).all())
    assert bool(((top + tall <= height) & (left + wide <= width)).all())
    assert ResizedCrop().box(height, width, rng.generator(seed, "test")) == tuple(
        ResizedCrop().boxes(1, height, width, rng.generator(seed, "test"))[0].tolist()
    )


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 1.0), (0.4, 0.9))])
def test_resized_crop_draws_boxes_as_torchvision_does(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    boxes = ResizedCrop(scale, ratio).boxes(4000, 24, 40, rng.generator(0, "test"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image, args = torch.zeros(1, 24, 40), (list(scale), list(ratio))
        theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, *args) for _ in range(2500)])
    assert_same_distribution(boxes, theirs)
    assert_within(boxes[:, 2:].flip(1), 24 * 40, scale, ratio)


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10)])
def test_where_no_box_fits_the_largest_allowed_one_in_the_middle_is_taken(height: int, width: int) -> None:
    boxes = ResizedCrop(scale=(1, 1)).boxes(3, height, width, rng.generator(0, "test"))
    middle = [0, 43, 10, 13] if height == 10 else [43, 0, 13, 10]
    assert boxes.tolist() == [middle] * 3


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_cropped_as_torchvision_crops_its_images_one_by_one(channels: int) -> None:
    draws = rng.generator(0, "images")
    images = torch.randint(256, (40, channels, 14, 19), generator=draws, dtype=torch.uint8)
    boxes = ResizedCrop().boxes(40, 14, 19, rng.generator(0, "test")).tolist()

    out = ResizedCrop()(images, rng.generator(0, "test"))

    exact = torch.stack(
        [tv.resized_crop(image.float(), *box, size=[14, 19]) for image, box in zip(images, boxes, strict=True)]
    )
    assert float((out.float() - exact).abs().max()) < 0.501  # rounded to the nearest level
    unscaled = ResizedCrop(scale=(1, 1), ratio=(19 / 14, 19 / 14))
    assert torch.equal(unscaled(images, rng.generator(0, "test")), images)
