from typing import Any

import pytest

from toughen.data import DATASETS, DataSettings, ExtraSettings, parse_spec
from toughen.data.augment import Crop, Flip
from toughen.errors import InputError


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        ("digits", "digits", None),
        ("cifar10", "cifar10", None),
        ("cifar10:a/b", "cifar10", "a/b"),
        ("folder:a/b", "folder", "a/b"),
        ("parquet:C:/x", "parquet", "C:/x"),
    ],
)
def test_a_spec_is_a_name_with_or_without_a_path(spec: str, name: str, path: str | None) -> None:
    settings = parse_spec(spec)
    assert (settings.name, settings.path) == (name, path)


def test_a_name_with_a_path_equals_name_and_path_apart() -> None:
    assert DataSettings(name="folder:a") == DataSettings(name="folder", path="a")


def test_the_sources_of_the_contract_are_registered() -> None:
    contract = {"digits", "cifar10", "cifar100", "imagenette", "imagenet", "folder", "parquet", "hf"}
    assert contract <= set(DATASETS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "cifar"}, "unknown data set 'cifar'; did you mean 'cifar10'"),
        ({"name": "digits", "path": "x"}, "data set 'digits' takes no path; data.path is 'x'"),
        ({"name": "folder"}, "data set 'folder' needs a path: folder:PATH, or data.path=PATH"),
        ({"name": "folder:"}, "data set 'folder' needs a path"),
        ({"name": "folder:a", "path": "b"}, "data.name 'folder:a' holds a path and data.path is 'b'"),
        ({"validation": 0}, "data.validation is 0; it must be at least 1"),
        ({"train_samples": 0}, "data.train_samples is 0; it must be at least 1"),
        ({"test_samples": -1}, "data.test_samples is -1; it must be at least 1"),
        ({"image_size": 0}, "data.image_size is 0; it must be at least 1"),
        ({"workers": -1}, "data.workers is -1; it must be at least 0"),
        ({"channels": 2}, "data.channels is 2; it must be 1 or 3"),
        ({"center": 0.0, "image_size": 8}, "data.center is 0.0; it must be above 0 and at most 1"),
        ({"center": 0.5}, "data.center is 0.5; it has a meaning only with data.image_size"),
        ({"resident_share": 1.5}, "data.resident_share is 1.5; it must be above 0 and at most 1"),
        ({"storage": "disk"}, "unknown data storage 'disk'. Allowed: auto, resident, streamed"),
        ({"on_error": "ignore"}, "unknown data on_error 'ignore'"),
        ({"augment": ("flip", "resized_crop")}, "data.augment: resized_crop must come first"),
        ({"split_seed": -1}, "data.split_seed is -1; it must be at least 0"),
        ({"augment": ("flop",)}, "unknown augmentation 'flop'; did you mean 'flip'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataSettings(**given)


def test_an_augmentation_is_its_name_or_its_settings() -> None:
    assert DataSettings(augment=("crop", Flip())).augmentations == (Crop(pad=4), Flip())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_extra_images_fill_a_part_of_a_batch(fraction: float) -> None:
    with pytest.raises(InputError, match=f"data.extra.fraction is {fraction}; it must lie between 0 and 1"):
        ExtraSettings(path="x.npz", fraction=fraction)
