"""Cross-entropy, and means of other losses, where some images have no label."""

import torch.nn.functional as F
from torch import Tensor

from toughen.attacks.probabilities import at_least_float32


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of -sum_k q_k log p_k over the images that have a label.

    With s = ``label_smoothing`` (Szegedy et al., 2016) q is s/K for each class, plus 1 - s for the true one; without,
    it is -log p_y.

    Args:
        logits: [B, K].
        y: [B], int64; -1 is an image without a label (Carmon et al., 2019), which contributes nothing.
        label_smoothing: s, in [0, 1).

    Returns:
        A scalar; 0 if no image has a label.
    """
    total = F.cross_entropy(
        at_least_float32(logits), y, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (y >= 0).sum().clamp(min=1)


def labelled_mean(values: Tensor, y: Tensor) -> Tensor:
    """Return the mean of ``values`` [B] over the images that have a label, a scalar; 0 if none has."""
    labelled = y >= 0
    return (values * labelled).sum() / labelled.sum().clamp(min=1)
