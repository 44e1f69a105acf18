import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toughen.data import crop_flip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Images in which every pixel of an image is different."""
    count = channels * height * width
    assert count < 255
    return (1 + torch.arange(count, dtype=torch.uint8)).view(1, channels, height, width).repeat(batch, 1, 1, 1)


def crops(image: Tensor, pad: int) -> list[Tensor]:
    _, height, width = image.shape
    padded = F.pad(image, (pad, pad, pad, pad))
    shifts = range(2 * pad + 1)
    return [padded[:, top : top + height, left : left + width] for top in shifts for left in shifts]


@given(
    seed=st.integers(0, 10_000),
    pad=st.integers(0, 3),
    flip=st.booleans(),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_every_result_is_a_crop_of_the_padded_image_or_its_mirror_image(
    seed: int, pad: int, flip: bool, channels: int, height: int, width: int, dtype: torch.dtype
) -> None:
    images = numbered(3, channels, height, width).to(dtype)
    out = crop_flip(images, pad=pad, flip=flip, generator=seeded(seed))
    assert out.dtype == dtype
    assert out.shape == images.shape
    for image, result in zip(images, out, strict=True):
        allowed = crops(image, pad)
        if flip:
            allowed += [crop.flip(-1) for crop in allowed]
        assert any(torch.equal(result, crop) for crop in allowed)


def test_all_shifts_and_both_directions_occur_about_equally_often() -> None:
    images = numbered(1800, 1, 4, 4)
    out = crop_flip(images, pad=1, flip=True, generator=seeded(0))
    allowed = crops(images[0], 1)
    allowed += [crop.flip(-1) for crop in allowed]
    counts = [int((out == crop).flatten(1).all(dim=1).sum()) for crop in allowed]
    assert sum(counts) == 1800
    assert min(counts) > 60  # 100 expected for each of 18, standard deviation 10
    assert max(counts) < 140


def test_no_shift_and_no_mirror_change_nothing() -> None:
    images = numbered(2, 3, 4, 4)
    assert torch.equal(crop_flip(images, pad=0, flip=False, generator=seeded(0)), images)


def test_the_generator_decides_and_the_global_state_stays() -> None:
    images = numbered(20, 1, 5, 5)
    before = torch.get_rng_state()
    first, again, other = (crop_flip(images, pad=2, flip=True, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_nothing_waits_for_the_host() -> None:
    images = numbered(8, 1, 5, 5).cuda()
    generator = torch.Generator(device="cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = crop_flip(images, pad=2, flip=True, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device == images.device
