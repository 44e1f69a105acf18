from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toughen.data import DataSettings, ImageSet, load
from toughen.data.splits import stratified_order
from toughen.errors import InputError


def rows(images: ImageSet) -> Counter[tuple[bytes, int]]:
    pixels = images.images.flatten(1).numpy()
    return Counter((row.tobytes(), int(label)) for row, label in zip(pixels, images.labels, strict=True))


def concatenated(*parts: ImageSet) -> Tensor:
    return torch.cat([part.images for part in parts])


ALL_DIGITS = load(DataSettings(validation=1))


@given(validation=st.integers(1, 1197), seed=st.integers(0, 50))
def test_the_splits_are_disjoint_and_complete(validation: int, seed: int) -> None:
    splits = load(DataSettings(validation=validation, split_seed=seed))
    everything = rows(ALL_DIGITS.train) + rows(ALL_DIGITS.validation) + rows(ALL_DIGITS.test)
    # The images are nearly all different, so equal multisets of 1,797 rows leave no room for overlap.
    assert rows(splits.train) + rows(splits.validation) + rows(splits.test) == everything
    assert len(splits.validation) == validation
    assert len(everything) > 1790


def test_the_digits_are_1797_images_of_the_known_sizes_and_levels() -> None:
    assert [len(part) for part in (ALL_DIGITS.train, ALL_DIGITS.validation, ALL_DIGITS.test)] == [1197, 1, 599]
    assert ALL_DIGITS.train.images.shape[1:] == (1, 8, 8)
    assert ALL_DIGITS.train.classes == tuple("0123456789")
    assert ALL_DIGITS.train.images.unique().numel() == 17
    assert (ALL_DIGITS.train.images.min(), ALL_DIGITS.train.images.max()) == (0, 255)


def test_the_digits_keep_their_labels() -> None:
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    raw = {tuple(image): int(label) for image, label in zip(data.astype(int).tolist(), target, strict=True)}
    levels = (ALL_DIGITS.test.images.flatten(1).double() * 16 / 255).round().long()
    assert [raw[tuple(image)] for image in levels.tolist()] == ALL_DIGITS.test.labels.tolist()


def test_the_split_seed_moves_validation_rows_and_never_test_rows() -> None:
    first, again, other = (load(DataSettings(validation=100, split_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(concatenated(first.train, first.validation), concatenated(again.train, again.validation))
    assert rows(first.validation) != rows(other.validation)
    assert torch.equal(first.test.images, other.test.images)


def test_fewer_samples_are_the_start_of_more() -> None:
    more = load(DataSettings(validation=100, train_samples=60, test_samples=50))
    fewer = load(DataSettings(validation=100, train_samples=20, test_samples=10))
    assert torch.equal(fewer.train.images, more.train.images[:20])
    assert torch.equal(fewer.test.images, more.test.images[:10])
    assert torch.equal(fewer.validation.images, more.validation.images)


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 100), start=st.integers(0, 180))
def test_every_start_of_the_order_holds_the_classes_in_their_shares(counts: list[int], seed: int, start: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    start = min(start, len(labels))
    for label, count in enumerate(counts):
        expected = start * count / len(labels)
        assert abs(int((labels[order[:start]] == label).sum()) - expected) <= len(counts)


def test_the_validation_images_hold_every_digit_equally_often() -> None:
    counts = load(DataSettings(validation=200)).validation.labels.bincount()
    share = load(DataSettings(validation=200)).train.labels.bincount() / 998 * 200
    assert (counts - share).abs().max() <= 1


def test_the_order_is_random_within_its_classes() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    first, second = (stratified_order(labels, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))


def test_the_middle_can_be_cut_out_of_images_in_memory() -> None:
    whole, middle = (load(DataSettings(validation=100, image_size=4, center=center)) for center in (1.0, 0.5))
    plain = load(DataSettings(validation=100))
    assert torch.equal(middle.test.images, plain.test.images[:, :, 2:6, 2:6])
    assert not torch.equal(middle.test.images, whole.test.images)


def test_image_size_resizes_every_part() -> None:
    splits = load(DataSettings(validation=100, image_size=4))
    assert {part.images.shape[1:] for part in (splits.train, splits.validation, splits.test)} == {(1, 4, 4)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DataSettings(validation=1198),
            "data.validation=1198 and at least 1 training image do not fit in the 1198 training images",
        ),
        (
            DataSettings(validation=1000, train_samples=199),
            "data.validation=1000 and data.train_samples=199 do not fit in the 1198 training images of 'digits'",
        ),
        (
            DataSettings(storage="streamed"),
            "'streamed', and 'digits' comes as a whole in memory; leave data.storage out",
        ),
        (DataSettings(test_samples=600), "data.test_samples=600, but 'digits' has 599 test images"),
    ],
)
def test_what_the_digits_do_not_have_is_an_error_with_the_numbers(settings: DataSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(settings)
