"""A batch that is dealt out to several processes is varied as the same batch in one piece."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from toughen.data import AUGMENTS, DataSplits, ImageSet, train_loader
from toughen.data.augment import Augmentation, ResizedCrop
from toughen.data.varied import varied
from toughen.errors import Notice
from toughen.rng import WHOLE, Share, generator, rows


def members() -> Iterator[Any]:
    for name, kind in AUGMENTS.items():
        if isinstance(kind, type) and kind is not ResizedCrop:  # that one is taken by image, before there is a batch
            yield pytest.param(kind(), id=name)


@pytest.mark.parametrize("member", list(members()))
def test_each_image_is_varied_alike_in_a_part_and_in_the_whole_batch(member: Augmentation) -> None:
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator(0, "images"))
    whole, _ = varied(images, (member,), generator(1, "augment", 2))
    parts = [varied(images[i::3], (member,), generator(1, "augment", 2, share=Share(i, 3)))[0] for i in range(3)]

    assert not torch.equal(whole, images / 255)
    for index, part in enumerate(parts):
        assert torch.equal(part, whole[index::3])


def test_a_part_of_a_part_is_dealt_out_in_turn_again() -> None:
    draw = lambda share: rows(torch.rand, (12 // share.count, 2), generator=generator(3, "draw", share=share))  # noqa: E731
    whole, half = draw(WHOLE), Share(1, 2)

    assert torch.equal(draw(half), whole[1::2])
    assert torch.equal(draw(half.part(2, 3)), whole[1::2][2::3])
    assert torch.equal(
        rows(torch.rand, (2, 4), generator=generator(3, "draw", share=Share(1, 3)), dim=1),
        torch.rand(2, 12, generator=generator(3, "draw"))[:, 1::3],
    )


def test_a_share_of_extra_images_that_the_processes_can_not_have_together_is_told() -> None:
    images = ImageSet(torch.zeros(24, 1, 4, 4, dtype=torch.uint8), torch.zeros(24, dtype=torch.int64), ("a",))
    splits = DataSplits("test", images, images, images, extra=images)
    settings = {"batch_size": 6, "device": "cpu", "seed": 0, "share": Share(0, 2)}
    with pytest.warns(Notice, match=r"fraction=0\.25 is 4 extra images in a batch of 2 processes, and 3 in one"):
        train_loader(splits, extra_fraction=0.25, **settings)
    train_loader(splits, extra_fraction=0.5, **settings)
