import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toughen.data import DataSplits, ImageSet
from toughen.errors import InputError


def images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def image_set(*shape: int) -> ImageSet:
    return ImageSet(images(*shape), torch.arange(shape[0]) % 2, ("a", "b"))


def test_a_label_outside_the_classes_is_named_with_its_row() -> None:
    with pytest.raises(InputError, match=r"label 3 in row 1 is outside 0\.\.2 \(3 classes\)"):
        ImageSet(images(4, 1, 2, 2), torch.tensor([0, 3, 1, -1]), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), r"images are float32 of shape \[2, 1, 2, 2\]"),
        (images(2, 2, 2), torch.zeros(2).long(), r"they must be uint8 of shape \[N, C, H, W\]"),
        (images(2, 1, 2, 2), torch.zeros(2), r"labels are float32 of shape \[2\]"),
        (images(2, 1, 2, 2), torch.zeros(3).long(), r"they must be int64 of shape \[2\]"),
        (images(0, 1, 2, 2), torch.zeros(0).long(), "at least one image is needed"),
    ],
)
def test_wrong_types_shapes_and_no_images_are_refused(pixels: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageSet(pixels, labels, ("a",))


def test_a_subset_holds_the_rows_asked_for_in_their_order() -> None:
    whole = image_set(6, 1, 2, 2)
    part = whole.subset(torch.tensor([5, 0]))
    assert len(part) == 2
    assert torch.equal(part.images, torch.stack([whole.images[5], whole.images[0]]))
    assert part.labels.tolist() == [1, 0]


def test_shrinking_averages_areas_and_rounds() -> None:
    pixels = torch.tensor([[0, 10, 100, 101], [0, 11, 102, 103], [255] * 4, [255] * 4], dtype=torch.uint8)
    small = ImageSet(pixels[None, None], torch.tensor([0]), ("a",)).resized(2)
    assert small.images.tolist() == [[[[5, 102], [255, 255]]]]  # 5.25 and 101.5


@given(value=st.integers(0, 255), size=st.integers(1, 12), height=st.integers(1, 9), width=st.integers(1, 9))
def test_resizing_a_constant_image_keeps_its_value(value: int, size: int, height: int, width: int) -> None:
    flat = ImageSet(torch.full((2, 1, height, width), value, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    out = flat.resized(size)
    assert out.images.shape == (2, 1, size, size)
    assert (out.images == value).all()
    assert torch.equal(out.labels, flat.labels)


def test_resizing_more_images_than_fit_a_chunk_keeps_every_row() -> None:
    pixels = images(5000, 1, 1, 1).expand(5000, 1, 2, 2)
    out = ImageSet(pixels, torch.zeros(5000).long(), ("a",)).resized(1)
    assert torch.equal(out.images.flatten(), pixels[:, 0, 0, 0])


def test_mean_and_std_are_those_of_the_training_pixels_by_channel() -> None:
    train, other = image_set(50, 3, 5, 4), image_set(2, 3, 5, 4)
    splits = DataSplits("x", train, other, other)
    pixels = train.images.double() / 255
    assert splits.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
    assert splits.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_has_a_std_that_one_can_divide_by() -> None:
    black = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    assert DataSplits("x", black, black, black).std == (1 / 255,)
