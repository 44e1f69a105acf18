"""Colour and shape operations against torchvision's, and the choice among them."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from toughen import rng
from toughen.data.augment import IDBHSVHN, ColourShape, CropShift, Erase, Flip, IDBHStrong, IDBHWeak, affine, colour

SHARES = {
    "colour": dict.fromkeys(
        ["saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotate"], 0.125
    ),
    "shape": {
        "saturation": 0.08,
        "brightness": 0.08,
        "contrast": 0.04,
        "sharpness": 0.08,
        "autocontrast": 0.04,
        "equalize": 0.08,
        "shear": 0.3,
        "rotate": 0.3,
    },
}


def photos(batch: int, channels: int, *, height: int = 11, width: int = 16) -> Tensor:
    """Random images that differ in brightness and contrast; the first is black, the second of one level."""
    draws = rng.generator(0, "images")
    top = torch.randint(1, 256, (batch, channels, 1, 1), generator=draws)
    images = (top * torch.rand(batch, channels, height, width, generator=draws)).to(torch.uint8)
    images[0], images[1] = 0, 77
    return images


def one_by_one(images: Tensor, numbers: Tensor, function: Callable[[Tensor, float], Tensor]) -> Tensor:
    return torch.stack([function(image, number) for image, number in zip(images, numbers.tolist(), strict=True)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colour.saturation, tv.adjust_saturation),
        (colour.brightness, tv.adjust_brightness),
        (colour.contrast, tv.adjust_contrast),
        (colour.sharpness, tv.adjust_sharpness),
    ],
    ids=["saturation", "brightness", "contrast", "sharpness"],
)
def test_a_factor_per_image_does_what_torchvision_does_with_one(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], channels: int
) -> None:
    images = photos(60, channels)
    factors = 0.1 + 1.8 * torch.rand(60, generator=rng.generator(0, "test"), dtype=torch.float64)

    difference = ours(images, factors).int() - one_by_one(images, factors, theirs).int()

    assert int(difference.abs().max()) <= 1
    assert float((difference != 0).double().mean()) < 0.02  # a level apart only where rounding decides


@pytest.mark.parametrize("channels", [1, 3])
def test_factor_one_leaves_images_as_they_are(channels: int) -> None:
    images, ones = photos(5, channels), torch.ones(5, dtype=torch.float64)
    for function in (colour.saturation, colour.brightness, colour.contrast, colour.sharpness):
        assert torch.equal(function(images, ones), images)


def test_images_too_small_to_be_smoothed_keep_their_sharpness() -> None:
    images = photos(3, 3, height=2)
    assert torch.equal(colour.sharpness(images, torch.zeros(3)), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_levels_are_stretched_image_by_image(name: str, channels: int) -> None:
    images = photos(30, channels)
    theirs = torch.stack([getattr(tv, name)(image) for image in images])
    assert torch.equal(getattr(colour, name)(images), theirs)


@pytest.mark.parametrize("channels", [1, 3])
def test_shears_and_rotations_take_the_pixels_that_torchvision_takes(channels: int) -> None:
    images = photos(60, channels)
    angles = torch.rand(60, generator=rng.generator(0, "test"), dtype=torch.float64) - 0.5
    zeros = torch.zeros_like(angles)

    def sheared(image: Tensor, across: float, down: float) -> Tensor:
        shear = [math.degrees(across), math.degrees(down)]
        return tv.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, fill=0)

    across = one_by_one(images, angles, lambda image, angle: sheared(image, angle, 0.0))
    down = one_by_one(images, angles, lambda image, angle: sheared(image, 0.0, angle))
    rotated = one_by_one(images, angles, lambda image, angle: tv.rotate(image, math.degrees(angle), fill=0))

    assert torch.equal(affine.shear(images, angles, zeros), across)
    assert torch.equal(affine.shear(images, zeros, angles), down)
    assert torch.equal(affine.rotate(images, angles), rotated)


def test_published_code_on_pil_images_does_the_same_within_a_level_and_but_for_few_moved_pixels() -> None:
    draws = rng.generator(0, "images")
    images = F.interpolate(torch.rand(40, 3, 8, 8, generator=draws), 32, mode="bicubic").clamp(0, 1)
    images = (255 * images).to(torch.uint8)
    strength = torch.rand(40, generator=draws, dtype=torch.float64)

    def theirs(numbers: Tensor, function: Callable[..., Image.Image]) -> Tensor:
        return one_by_one(images, numbers, lambda image, n: tv.pil_to_tensor(function(tv.to_pil_image(image), n)))

    def sheared(image: Image.Image, radians: float) -> Image.Image:
        return tv.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=[math.degrees(radians), 0.0], fill=0)

    for name in ("saturation", "brightness", "contrast", "sharpness"):
        factors = 0.5 + 1.4 * strength
        pil = theirs(factors, getattr(tv, f"adjust_{name}"))
        assert int((getattr(colour, name)(images, factors).int() - pil.int()).abs().max()) <= 1
    for name in ("autocontrast", "equalize"):
        pil = theirs(strength, lambda image, _, name=name: getattr(tv, name)(image))
        assert int((getattr(colour, name)(images).int() - pil.int()).abs().max()) <= 1
    degrees = (1 + 10 * strength).floor()
    moved = [
        affine.shear(images, strength, torch.zeros(40)) != theirs(strength, sheared),
        affine.rotate(images, degrees.deg2rad()) != theirs(degrees, lambda image, n: tv.rotate(image, n, fill=0)),
    ]
    assert max(float(part.double().mean()) for part in moved) < 0.005


class Recorder:
    """Stands in for all operations: paints an image with the operation's number and keeps what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: dict[str, tuple[Tensor, ...]] = {}
        for number, name in enumerate(SHARES["colour"], start=1):
            module = affine if name in ("shear", "rotate") else colour
            monkeypatch.setattr(module, name, lambda images, *told, n=number, to=name: self.paint(images, n, to, told))

    def paint(self, images: Tensor, number: int, name: str, told: tuple[Tensor, ...]) -> Tensor:
        self.told[name] = told
        return torch.full_like(images, number)


@pytest.mark.parametrize("bias", ["colour", "shape"])
def test_each_operation_is_chosen_as_often_as_its_share(
    bias: Literal["colour", "shape"], monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder(monkeypatch)
    count = 4000

    out = ColourShape(bias)(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), rng.generator(0, "test"))

    assert sum(SHARES[bias].values()) == pytest.approx(1)
    for number, share in enumerate(SHARES[bias].values(), start=1):
        chosen = int((out[:, 0, 0, 0] == number).sum())
        assert abs(chosen - count * share) < 4 * (count * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("bias", "radians", "degrees"), [("colour", 0.15, 10), ("shape", 0.35, 30)])
def test_strengths_fill_their_ranges(
    bias: Literal["colour", "shape"], radians: float, degrees: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)

    ColourShape(bias)(torch.zeros(8000, 1, 1, 1, dtype=torch.uint8), rng.generator(0, "test"))

    lows = {"saturation": 0.1, "brightness": 0.5, "contrast": 0.5, "sharpness": 0.1}
    for name, low in lows.items():
        (factors,) = recorder.told[name]
        assert low <= float(factors.min()) < low + 0.05
        assert 1.85 < float(factors.max()) <= 1.9
    across, down = recorder.told["shear"]
    assert bool(((across == 0) != (down == 0)).all())
    for angles in (across[across != 0], down[down != 0]):
        assert 0.05 <= float(angles.abs().min()) < 0.06
        assert radians - 0.01 < float(angles.abs().max()) <= radians
        assert 0.4 < float((angles > 0).double().mean()) < 0.6
    (angles,) = recorder.told["rotate"]
    drawn = angles.rad2deg()
    assert torch.allclose(drawn, drawn.round())
    whole = [n for n in range(-degrees, degrees + 1) if n != 0]
    assert sorted(set(drawn.round().int().tolist())) == whole


def test_every_result_stands_in_the_place_of_its_image() -> None:
    images = photos(400, 3)
    images[::3] = 0  # black stays black under all eight, and nothing else becomes black

    out = ColourShape()(images, rng.generator(0, "test"))

    assert torch.equal(out.flatten(1).any(dim=1), images.flatten(1).any(dim=1))


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        (IDBHWeak(), [Flip(), CropShift(0, 11), ColourShape("colour"), Erase(p=0.5)]),
        (IDBHStrong(), [Flip(), CropShift(0, 11), ColourShape("colour"), Erase(p=1.0)]),
        (IDBHSVHN(), [Flip(), CropShift(0, 9), ColourShape("shape"), Erase(p=1.0, scale=(0.02, 0.5))]),
    ],
    ids=["weak", "strong", "svhn"],
)
def test_idbh_is_its_four_parts_one_after_the_other(
    whole: Callable[[Tensor, torch.Generator], Tensor], parts: list[Callable[[Tensor, torch.Generator], Tensor]]
) -> None:
    images = photos(20, 3)
    draws = rng.generator(0, "test")
    expected = images
    for part in parts:
        expected = part(expected, draws)

    assert torch.equal(whole(images, rng.generator(0, "test")), expected)
