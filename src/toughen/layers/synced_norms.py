"""Batch norm over the whole batch where several processes hold a part of it each."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toughen import processes
from toughen.errors import Notice

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(_BatchNorm):
    """Batch norm whose statistics in train mode are those of all processes' parts together.

    ``nn.SyncBatchNorm`` does not run on CPUs, and its gradient can't be differentiated, as GradAlign has to.

    Attributes:
        replaced: The class of torch's whose place it takes.
    """

    replaced: type[_BatchNorm] = nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of the whole batch in train mode, else by the running ones."""
        if not self.training or processes.count() == 1:
            return super().forward(x)
        channels, rest = [1, -1, *[1] * (x.dim() - 2)], [0, *range(2, x.dim())]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # with the number of values: parts differ where images were skipped
        whole = _Summed.apply(torch.cat([wide.sum(rest), wide.new_tensor([wide.numel() / wide.shape[1]])]))
        size = whole[-1].detach()
        mean = whole[:-1] / size
        centred = wide - mean.view(channels)
        variance = _Summed.apply(centred.square().sum(rest)) / size
        if self.track_running_stats:
            self._take_note(mean.detach(), variance.detach() * size / (size - 1).clamp(min=1))
        normal: Tensor = centred * (variance + self.eps).rsqrt().view(channels)
        if self.affine:
            normal = normal * self.weight.view(channels) + self.bias.view(channels)
        return normal.to(x.dtype)

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
    """The sum over the processes. Each has its own loss, and their gradients add up too, to any order."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole: Tensor = _Summed.apply(gradient.contiguous())
        return whole


def synchronise_norms(model: nn.Module) -> None:
    """Let batch norm take its statistics from all processes, in place; parameters, buffers and names stay.

    Exactly torch's own classes do; a subclass may do more in its forward, and that it keeps statistics of its own is
    told.
    """
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) in _NORMS:
                synced = _like(norm, SyncedBatchNorm)
                synced.replaced = type(norm)
                setattr(module, name, synced)
    rest = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)} - {"SyncedBatchNorm"})
    if rest and processes.rank() == 0:
        warnings.warn(f"in train mode, {', '.join(rest)} takes statistics per process", Notice, stacklevel=2)


def localise_norms(model: nn.Module) -> None:
    """Let the batch norm that ``synchronise_norms`` changed take its statistics per process again, in place."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, SyncedBatchNorm):
                setattr(module, name, _like(norm, norm.replaced))


def is_synchronised(model: nn.Module) -> bool:
    """Whether any batch norm takes its statistics from all processes."""
    return any(isinstance(module, SyncedBatchNorm) for module in model.modules())


def has_local_norms(model: nn.Module) -> bool:
    """Whether any batch norm takes its statistics from this process's images alone."""
    return any(isinstance(module, _BatchNorm) and not isinstance(module, SyncedBatchNorm) for module in model.modules())


def _like(norm: Any, kind: Any) -> Any:
    """Return a norm of another class with the same parameters and buffers."""
    other = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    other._parameters, other._buffers = norm._parameters, norm._buffers
    other.training = norm.training
    return other
