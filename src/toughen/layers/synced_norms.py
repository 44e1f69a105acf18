"""Batch norm over the whole batch where several processes hold a part of it each."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toughen import processes

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` for CPUs, for which torch has none."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of all processes' parts in train mode, else by the running ones."""
        if not self.training or processes.count() == 1:
            return super().forward(x)
        channels, rest = [1, -1, *[1] * (x.dim() - 2)], [0, *range(2, x.dim())]
        size = x.numel() // x.shape[1] * processes.count()
        mean = _summed(x.sum(rest)) / size
        centred = x - mean.view(channels)
        variance = _summed(centred.square().sum(rest)) / size
        if self.track_running_stats:
            self._take_note(mean.detach(), variance.detach() * size / max(size - 1, 1))
        normal = centred * (variance + self.eps).rsqrt().view(channels)
        if not self.affine:
            return normal
        return normal * self.weight.view(channels) + self.bias.view(channels)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take images and vectors of any shape, as the norm did that this one replaces."""

    def _take_note(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / int(self.num_batches_tracked)
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(value, share)


class _Summed(torch.autograd.Function):
    """The sum over the processes. Each has its own loss, and their gradients add up too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole)
        return whole


def _summed(part: Tensor) -> Tensor:
    whole: Tensor = _Summed.apply(part)
    return whole


def synchronise_norms(model: nn.Module) -> None:
    """Let batch norm take its statistics from all processes, in place; parameters, buffers and names stay.

    On a CPU exactly torch's own classes do: a subclass may do more in its forward, and keeps statistics of its own.
    """
    if next(model.parameters()).device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # knows timm's own norms too
        return
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) in _NORMS:
                setattr(module, name, _synchronised(norm))


def _synchronised(norm: Any) -> SyncedBatchNorm:
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    synced._parameters, synced._buffers = norm._parameters, norm._buffers
    synced.training = norm.training
    return synced
