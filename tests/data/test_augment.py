"""What every augmentation promises, and how settings are refused."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from toughen import rng
from toughen.data.augment import (
    AUGMENTS,
    ColourShape,
    Crop,
    CropFlip,
    CropShift,
    Cutout,
    Erase,
    IDBHStrong,
    IDBHWeak,
    ResizedCrop,
)
from toughen.errors import InputError


def images(batch: int = 12, channels: int = 3, height: int = 13, width: int = 17) -> Tensor:
    draws = rng.generator(0, "images")
    return torch.randint(1, 256, (batch, channels, height, width), generator=draws, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTS)
def test_shape_dtype_and_device_stay_and_the_given_images_keep_their_values(name: str, channels: int) -> None:
    given = images(channels=channels)
    before = given.clone()

    out = AUGMENTS[name]()(given, rng.generator(0, "test"))

    assert (out.shape, out.dtype, out.device) == (given.shape, given.dtype, given.device)
    assert torch.equal(given, before)
    assert not torch.equal(out, before)


@pytest.mark.parametrize("name", AUGMENTS)
def test_the_generator_decides_everything_and_the_global_state_stays(name: str) -> None:
    augment = AUGMENTS[name]()
    before = torch.get_rng_state()

    first, again, other = (augment(images(), rng.generator(seed, "test")) for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", AUGMENTS)
def test_how_many_numbers_are_drawn_does_not_depend_on_the_pixels(name: str) -> None:
    one, other = rng.generator(0, "test"), rng.generator(0, "test")

    AUGMENTS[name]()(images(), one)
    AUGMENTS[name]()(torch.zeros_like(images()), other)

    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("name", AUGMENTS)
def test_a_batch_of_no_image_stays_one(name: str) -> None:
    assert AUGMENTS[name]()(images(batch=0), rng.generator(0, "test")).shape == (0, 3, 13, 17)


@pytest.mark.parametrize("name", AUGMENTS)
def test_an_augmentation_is_frozen_and_equal_to_another_with_the_same_settings(name: str) -> None:
    augment = AUGMENTS[name]()

    assert augment == AUGMENTS[name](**{field.name: getattr(augment, field.name) for field in fields(augment)})
    assert len({augment, AUGMENTS[name]()}) == 1
    with pytest.raises(FrozenInstanceError):
        augment.pad = 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", AUGMENTS)
def test_on_a_gpu_nothing_waits_for_the_host_and_the_same_is_done(name: str) -> None:
    given, on_host = images().cuda(), AUGMENTS[name]()(images(), rng.generator(0, "test"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = AUGMENTS[name]()(given, rng.generator(0, "test"))
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert out.device == given.device
    differs = out.cpu().int() != on_host.int()
    assert differs.float().mean() < 0.01  # sums and interpolation may round otherwise


@pytest.mark.parametrize(
    ("augment", "settings", "message"),
    [
        (Crop, {"pad": -1}, "crop's pad is -1; it must be at least 0"),
        (CropFlip, {"pad": -2}, "crop_flip's pad is -2; it must be at least 0"),
        (CropShift, {"low": 3, "high": 3}, "crop_shift has low=3 and high=3; it needs 0 <= low < high"),
        (CropShift, {"low": -1}, "crop_shift has low=-1 and high=11; it needs 0 <= low < high"),
        (Cutout, {"size": 0}, "cutout's size is 0; it must be at least 1"),
        (Erase, {"p": 1.5}, r"erase's p is 1.5; a probability lies in \[0, 1\]"),
        (Erase, {"scale": (0.5, 0.1)}, r"erase's scale is \(0.5, 0.1\); .* \(low, high\) with 0 < low <= high <= 1"),
        (Erase, {"scale": (0.5, 1.1)}, r"erase's scale is \(0.5, 1.1\)"),
        (Erase, {"ratio": (0.0, 1.0)}, r"erase's ratio is \(0.0, 1.0\); .* 0 < low <= high$"),
        (ResizedCrop, {"scale": (0.0, 1.0)}, r"resized_crop's scale is \(0.0, 1.0\)"),
        (ResizedCrop, {"ratio": (2.0, 1.0)}, r"resized_crop's ratio is \(2.0, 1.0\)"),
        (ColourShape, {"bias": "colr"}, "unknown colour_shape bias 'colr'; did you mean 'colour'"),
    ],
)
def test_a_setting_outside_its_range_is_refused_in_one_line(augment: Any, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        augment(**settings)
    assert "\n" not in str(error.value)


def test_images_smaller_than_the_largest_cut_are_refused() -> None:
    with pytest.raises(InputError, match="crop_shift cuts up to 10 pixels; images of 8x9 allow high <= 8"):
        IDBHWeak()(images(height=8, width=9), rng.generator(0, "test"))


def test_colours_of_two_channels_are_refused() -> None:
    with pytest.raises(InputError, match="colour_shape was given images of 2 channels"):
        IDBHStrong()(images(channels=2), rng.generator(0, "test"))
