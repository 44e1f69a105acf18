"""One update of the weights: a batch in its parts, their gradients added up, and a step only if they are finite."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from toughen import processes
from toughen.engine.recipe import TrainSettings
from toughen.engine.sharding import is_sharded, whole
from toughen.layers import has_local_norms
from toughen.objectives import Live
from toughen.rng import Share, stream_seed
from toughen.types import Batch


class LossOfBatch(nn.Module):
    """Perturb a batch and return its loss, as the one forward that DDP has to see.

    The attack inside runs on the bare model, so that its passes cost no exchange of gradients.
    """

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.model = live.model
        self.own = nn.ParameterList(live.own_parameters().values())
        self._live = live

    def forward(self, batch: Batch, index: int, count: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return loss and terms of a batch that is part ``index`` of ``count``."""
        output = self._live.on(batch, share=Share(index, count))
        return output.loss, output.terms


class Updater:
    """Takes the optimizer's steps, in every process the same.

    Args:
        fabric: Devices, precision and processes.
        live: The method.
        optimizer: Made by ``make_optimizer``.
        settings: Of training.
    """

    def __init__(self, fabric: Fabric, live: Live, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
        self.fabric, self.live, self.optimizer, self.settings = fabric, live, optimizer, settings
        self._wrapped: nn.Module | None = None
        self._trains: tuple[bool, ...] = ()
        self._is_sharded = is_sharded(live.model)
        self._has_local_norms = has_local_norms(live.model)

    def epoch_start(self) -> None:
        """Take note of what trains now: DDP exchanges what asked for a gradient when it was made, and nothing else."""
        trains = tuple(parameter.requires_grad for parameter in self.live.parameters())
        if self._wrapped is None or trains != self._trains:
            self._wrapped = None  # two at once would both exchange
            loss = LossOfBatch(self.live)
            self._wrapped = loss if self._is_sharded else self.fabric.setup_module(loss)
            self._trains = trains

    def update(self, batch: Batch, *place: int) -> dict[str, Tensor]:
        """Use a batch once.

        Args:
            batch: This process's rows of it.
            place: Epoch, step and, above 0, replay: what dropout and its like draw depends on it alone.

        Returns:
            Loss, its terms, ``gradient_norm`` and ``spoiled``: 1 if the gradient was not finite, so that nothing was
            changed, else 0. Scalars, float64; the terms are those of this process.
        """
        assert self._wrapped is not None
        parts, mine = self.settings.accumulate, processes.share()
        sums: dict[str, Tensor] = {}
        statistics = self._statistics()
        before = processes.packed(statistics) if statistics else None
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(parts):
            rows = Batch(*(None if t is None else t[number::parts] for t in batch))  # type: ignore[arg-type]
            share = mine.part(number, parts)
            stream = f"forward of part {share.index}" if share.index else "forward"
            torch.manual_seed(stream_seed(self.settings.seed, stream, *place))
            with self._exchanged(if_last=number == parts - 1), self.fabric.autocast():
                loss, terms = self._wrapped(rows, share.index, share.count)
                self.fabric.backward(loss / parts)
            for name, value in {"loss": loss.detach(), **terms}.items():
                part = value.double() / parts
                sums[name] = sums[name] + part if name in sums else part
        return {**sums, **self._step(statistics, before)}

    def _step(self, statistics: Sequence[Tensor], before: Tensor | None) -> dict[str, Tensor]:
        """Take the optimizer's step, unless the gradient is not finite: decided on the device, which never waits."""
        gradients = [p.grad for p in self.live.parameters() if p.grad is not None]
        norm = whole(get_total_norm(gradients))
        spoiled = ~norm.isfinite()
        self._give_momentum()
        if self._is_sharded:  # such an optimizer can't be told
            leave_out = bool(spoiled)
        else:
            leave_out, self.optimizer.found_inf = False, spoiled.float()  # type: ignore[attr-defined]  # as GradScaler
        if not leave_out:
            self.optimizer.step()
        if before is not None:
            after = processes.packed(statistics)
            if self._has_local_norms:  # of what changed alone: a mean of equal numbers need not be that number
                change = after - before
                processes.average([change])
                after = before + change
            processes.unpack(torch.where(spoiled, before, after), statistics)
        self.live.step_end()
        return {"gradient_norm": norm.double(), "spoiled": spoiled.double()}

    def _exchanged(self, *, if_last: bool) -> AbstractContextManager[None]:
        """Let DDP exchange gradients once, after the last part of a batch."""
        if self._is_sharded:
            return nullcontext()
        return self.fabric.no_backward_sync(self._wrapped, enabled=not if_last)  # type: ignore[arg-type]

    def _statistics(self) -> list[Tensor]:
        """What forward passes change beside the weights, such as batch norm's running statistics."""
        return [buffer for buffer in self.live.model.buffers() if buffer.is_floating_point()]

    def _give_momentum(self) -> None:
        """Let SGD begin with a momentum of zero: after a spoiled step, what it would begin with is not defined."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                state = self.optimizer.state
                if parameter.grad is not None and "momentum_buffer" not in state.get(parameter, {}):
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
