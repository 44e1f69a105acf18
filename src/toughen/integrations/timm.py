"""A training task of timm, for its train script: a module whose forward is the loss."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.integrations.guest import AnyMethod, Guest, Pairs, given_first
from toughen.layers.taps import random_state_kept
from toughen.models import Normalize

try:
    from timm.task import TrainingTask
except ModuleNotFoundError:
    raise ModuleNotFoundError("this release of timm has no timm.task; pip install 'timm>=1.0.27'") from None


class CLATTask(TrainingTask):
    """Adversarial training in timm's train script, in the place of its ``ClassificationTask``.

    The script's images must come as they are, in [0, 1]: ``--mean 0 0 0 --std 1 1 1``; the task puts the normalisation
    into the network, before it, and the checkpoints of the script hold both. Its losses and label smoothing have no
    effect, since the loss is the method's. The method's state is in the script's checkpoints, as ``task_state``.

    Under DDP the loss is what is wrapped, anew whenever other layers are to train.

    Args:
        model: A network of timm.
        method: For example ``CLAT(k=3)`` or ``stack(TRADES(), CLAT(k=3))``.
        attack: Finds the perturbations.
        mean: Channel means that the network subtracts; None is what timm says of its weights.
        std: Channel standard deviations; None as for ``mean``.
        seed: Of random starts.
        device: Where the network is.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: AnyMethod,
        attack: Attack,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device=device, verbose=False)
        facts: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
        normalize = Normalize(mean or facts.get("mean", ()), std or facts.get("std", ()))
        self.trainable_module = nn.Sequential(OrderedDict(normalize=normalize, net=model)).to(self.device)
        self.guest = Guest(method, self.trainable_module, attack=attack, host="timm's script", seed=seed)
        self._loss: nn.Module = _Loss(self.guest)
        self._distributed: dict[str, Any] | None = None
        self._wrapped: tuple[bool, ...] = ()
        self._attached = False

    def epoch_start(self, epoch: int, *, probe: Pairs, optimizer: torch.optim.Optimizer) -> Selection | None:
        """Select and freeze, when it is due; to be called at the start of each epoch.

        Args:
            epoch: Epochs done so far.
            probe: Training images as (x, y) batches, of which the first are measured; the training loader will do.
            optimizer: Over all parameters of ``get_trainable_module()``.
        """
        if not self._attached:
            self.guest.attach(optimizer, where="create_optimizer_v2")
            self._attached = True
        with random_state_kept(self.trainable_module):  # a loader draws from it when it begins
            selection = self.guest.epoch_start(epoch, lambda size: given_first(probe, size), optimizer)
        if self._distributed is not None and self.guest.trains() != self._wrapped:
            self._wrap()
        return selection

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, differentiable, and its terms: input [B, C, H, W] in [0, 1], target [B].

        Raises:
            InputError: The labels are mixed.
        """
        if target.ndim != 1 or target.is_floating_point():
            raise InputError(
                "labels are mixed, and an attack wants one class for each image; leave out mixup and cutmix"
            )
        loss, terms = self._loss(input, target)
        return {"loss": loss, **terms}

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "CLATTask":
        """Let DDP exchange the gradients of what trains."""
        # DDP takes devices where there are GPUs, and timm's script names one always
        self._distributed = {"device_ids": None if self.device.type == "cpu" else device_ids, **ddp_kwargs}
        self._wrap()
        return self

    def _wrap(self) -> None:
        self._loss = _Loss(self.guest)  # first: two DDPs at once would both exchange
        self._loss = DistributedDataParallel(self._loss, **(self._distributed or {}))
        self._wrapped = self.guest.trains()

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, no gradients are exchanged."""
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) else nullcontext()

    def compile(self, *_: Any, **__: Any) -> None:
        """Refuse: attacks look into the network.

        Raises:
            InputError: Always.
        """
        raise InputError("CLATTask attacks the network as it is; leave out --torchcompile, or use `toughen train`")

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the method, which belongs to the network and not to its average."""
        return {} if ema else self.guest.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Go on from a state; the script has loaded the weights before."""
        if not ema and state is None:
            raise InputError("the checkpoint has no state of a method: it was not written with CLATTask")
        if not ema and state is not None:
            self.guest.load_state_dict(state)


class _Loss(nn.Module):
    """The one forward that DDP has to see; attacks inside run on the bare network."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self.network = guest.live.model
        self._guest = guest

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self._guest(x, y)
        return output.loss, output.terms
