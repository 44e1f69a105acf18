from typing import Any

import pytest

from toughen.data import DATASETS, DataSettings, parse_spec
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


def test_all_four_sources_are_registered() -> None:
    assert sorted(DATASETS) == ["cifar10", "digits", "folder", "parquet"]


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
        ({"pad": -1}, "data.pad is -1; it must be at least 0"),
        ({"split_seed": -1}, "data.split_seed is -1; it must be at least 0"),
        ({"augment": "flip"}, "unknown data.augment 'flip'; did you mean 'crop_flip'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataSettings(**given)
