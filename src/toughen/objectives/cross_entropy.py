"""Cross-entropy where some images have no label."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean of -log p_y over the images that have a label.

    Args:
        logits: [B, K].
        y: [B], int64; -1 is an image without a label (Carmon et al., 2019), which contributes nothing.

    Returns:
        A scalar; 0 if no image has a label.
    """
    total = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
    return total / (y >= 0).sum().clamp(min=1)
