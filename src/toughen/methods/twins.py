"""TWINS (Liu et al. 2023): half of each batch keeps the batch statistics of the start, so fine-tuning forgets less."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.layers.taps import mode
from toughen.methods.clat import CLAT
from toughen.methods.wrapper import InnerLoss, LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live, Method
from toughen.objectives.settings import check_weight
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput

T = TypeVar("T", Batch, AdversarialBatch)


@METHODS.register("twins")
@dataclass(frozen=True, kw_only=True)
class TWINS(Wrapper):
    """Two nets that share all but batch norm: ``lam * L_frozen(one half) + L_adaptive(the other)`` of each batch.

    L is the loss of the inner method, on the half of the perturbed batch that each net gets. The adaptive net is the
    model itself; the attack sees it alone, and it is what is deployed. In the frozen net batch norm normalises with the
    running statistics of the start, always in eval mode, and has scale and shift of its own, which begin as copies of
    the model's and train. It gets every second image, so that both nets have their share of the extra images, which
    stand at the end of a batch; of an odd batch that is the smaller half, of a single image nothing.

    TWINS-AT is ``stack(PGDAT(), TWINS())``. The paper's TWINS-TRADES with beta 6 sums the KL divergence over each half
    but divides by the size of the whole batch; the inner method divides by the size of its half. So the same loss is
    ``stack(TRADES(beta=3), TWINS())``.

    Args:
        lam: Weight of the frozen net, >= 0.
        start_epoch: Epochs that the inner method trains before on whole batches; the statistics are those of then.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "TWINS"
    shapes_step: ClassVar[bool] = True
    conflicts: ClassVar[Mapping[str, str]] = {
        "free-at": "its perturbation comes from the gradient of the whole batch in one net, and TWINS has two; wrap"
        " pgd-at or fast-at instead"
    }

    lam: float = 1.0
    start_epoch: int = 0

    def __post_init__(self) -> None:
        check_weight(self.lam, where="twins lam")
        if self.start_epoch < 0:
            raise InputError(f"twins start_epoch is {self.start_epoch}; it must be >= 0")

    def check_stack(self, methods: Sequence[Method]) -> None:
        """See ``Method.check_stack``."""
        for method in methods[: methods.index(self)]:
            if isinstance(method, CLAT) and method.norm_stats == "follow":
                raise InputError(
                    f"{method.label} inside {self.label} with norm_stats='follow' would move batch statistics that the"
                    " frozen net must keep; put it behind twins, or set norm_stats='frozen'"
                )

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveTWINS":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method.
        """
        return LiveTWINS(self.around(inner), settings=self, seed=seed)


class LiveTWINS(LiveWrapper):
    """TWINS bound to a model."""

    def __init__(self, inner: Live, *, settings: TWINS, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self._inner_loss = InnerLoss(inner)
        self._norms = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        tensors = self._model_tensors()
        self._affine = {n: nn.Parameter(t.detach().clone()) for n, t in tensors.items() if n.endswith(_AFFINE)}
        self._statistics = {n: t.clone() for n, t in tensors.items() if n.endswith(_STATISTICS)}
        self._started = settings.start_epoch == 0

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Take the batch norm of the frozen net from the model, when TWINS starts; see ``Live.epoch_start``."""
        selection = super().epoch_start(epoch, probe, optimizer=optimizer)
        if not self._started and epoch >= self.settings.start_epoch:
            self._started = True
            self._set_frozen_net(self._model_tensors())
        return selection

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return ``lam`` times the inner loss of every second image in the frozen net, plus that of the others."""
        if not self._started or len(adv.x_adv) < 2:
            return self.inner.loss(adv)
        adv = adv.elsewhere()
        frozen = self._frozen_loss(_rows(adv, slice(1, None, 2)))
        adaptive = self.inner.loss(_rows(adv, slice(0, None, 2)))
        loss = self.settings.lam * frozen + adaptive.loss
        return StepOutput(loss, {**adaptive.terms, "frozen": frozen.detach()})

    def _frozen_loss(self, adv: AdversarialBatch) -> Tensor:
        tensors = {f"model.{name}": tensor for name, tensor in {**self._affine, **self._statistics}.items()}
        with ExitStack() as stack:
            for norm in self._norms.values():
                stack.enter_context(mode(norm, training=False))
            # every tensor is named, so none has to follow another that it is tied to
            output: StepOutput = functional_call(self._inner_loss, tensors, (adv,), tie_weights=False)
        return output.loss

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        if not self._norms:
            raise InputError(
                f"twins gives each half of a batch its own batch norm, and {type(self.model).__name__} has none with"
                " running statistics; use a network with batch norm, for example resnet18"
            )
        super().check(example)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return scale and shift of the frozen net's batch norm, with those of the inner method, by name."""
        return {**super().own_parameters(), **{f"twins.{name}": tensor for name, tensor in self._affine.items()}}

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        tensors = {name: tensor.detach().clone() for name, tensor in {**self._affine, **self._statistics}.items()}
        return {**super().state_dict(), "started": self._started, "frozen_net": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        self._started = state["started"]
        self._set_frozen_net(state["frozen_net"])

    def _model_tensors(self) -> dict[str, Tensor]:
        """Scale, shift and running statistics of the model's batch norm, by qualified name."""
        return {
            f"{name}.{kind}": tensor
            for name, norm in self._norms.items()
            for kind in (*_AFFINE, *_STATISTICS)
            if (tensor := getattr(norm, kind)) is not None
        }

    def _set_frozen_net(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in {**self._affine, **self._statistics}.items():
                tensor.copy_(tensors[name])


_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")


def _rows(batch: T, rows: slice) -> T:
    """Some rows of every tensor of a batch, and of the batches that it holds."""
    values: list[Any] = []
    for value in batch:
        if isinstance(value, Tensor):
            values.append(value[rows])
        else:
            values.append(None if value is None else _rows(value, rows))
    return type(batch)(*values)
