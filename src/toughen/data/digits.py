"""The embedded data set: 1,797 scanned digits of 8x8 pixels, one channel, from scikit-learn."""

import torch

from toughen import rng
from toughen.data.image_set import ImageSet
from toughen.data.settings import DATASETS, DataSettings, Source

_NUM_TEST = 599  # a third


def read_digits(_: DataSettings) -> tuple[ImageSet, ImageSet]:
    """Return the training rows (1,198) and the test rows (599), the same for every seed."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    data, target = load_digits(return_X_y=True)
    images = (torch.from_numpy(data) * (255 / 16)).round().to(torch.uint8)  # levels 0..16
    digits = ImageSet(
        images.view(-1, 1, 8, 8),
        torch.from_numpy(target).to(torch.int64),
        tuple(str(digit) for digit in range(10)),
    )
    order = torch.randperm(len(digits), generator=rng.generator(0, "split", 0))
    return digits.subset(order[_NUM_TEST:]), digits.subset(order[:_NUM_TEST])


DATASETS.register("digits")(Source(read_digits, path="none"))
