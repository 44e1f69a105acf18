"""What a model believes of each image, and distances between beliefs: per sample, in at least float32."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are: sums over exp and squares need more than 8 bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def probabilities(logits: Tensor) -> Tensor:
    """Return p = softmax(z), [B, K]."""
    return at_least_float32(logits).softmax(dim=1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log p, [B, K], finite for all finite logits."""
    return at_least_float32(logits).log_softmax(dim=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum_k p_k (log p_k - log q_k), [B], from log-probabilities [B, K]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def squared_error(p: Tensor, y: Tensor) -> Tensor:
    """Return ||p - e_y||^2, [B], in [0, 2]; 0 for an image without a label (-1). p: [B, K], y: [B]."""
    one_hot = torch.zeros_like(p).scatter(1, y.clamp(min=0)[:, None], 1.0)
    return squared_distance(p, one_hot) * (y >= 0)


def squared_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return ||p - q||^2, [B], in [0, 2], for probabilities [B, K]."""
    return (p - q).square().sum(dim=1)
