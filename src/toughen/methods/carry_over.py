"""ATTA (Zheng et al. 2020): each image's attack goes on from where it ended an epoch before, so fewer steps do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack, gaussian_start
from toughen.attacks.threat import BALLS
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.methods.wrapper import LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live
from toughen.types import AdversarialBatch, Batch, Batches, Norm


@dataclass(frozen=True)
class _Format:
    """How a perturbation is stored: in which type, and by which value where there is none."""

    dtype: torch.dtype
    none: float


_LEVELS = 127  # eps in steps of int8
# l_2 spends its budget unevenly, which no fixed step fits
_FORMATS: dict[Norm, _Format] = {"linf": _Format(torch.int8, -128), "l2": _Format(torch.float16, math.inf)}


@METHODS.register("carry-over")
@dataclass(frozen=True, kw_only=True)
class CarryOver(Wrapper):
    """Begin the attack on image i at ``x_i + delta_i``, where delta_i is what the inner method found an epoch before.

    The perturbation of each image is stored pixel by pixel as the image lies in the data set. It follows the pixels
    through crops, flips and blanked boxes (``Batch.source``), and what the attack makes of it goes back the same way. A
    pixel that was cut away keeps the value it had. One without a value, such as padding, begins at random in the ball;
    if the attack has no random start, at 0.001 N(0, 1), since at a clean image the goal of TRADES has no gradient. In
    an epoch in which nothing is stored yet, the attack starts as it does without this method.

    How many steps follow is up to the attack: the paper takes 1 to 10. Its code stores the zero padding of a crop too,
    starts at x + 0.001 N(0, 1) after each reset, resets first after nine epochs, and perturbs by cross-entropy also
    where it trains with TRADES; here the inner method says what its attack maximises.

    Args:
        reset_every: Epochs after which all perturbations are dropped, at least 2; None keeps them. The paper's is 10.
        start_epoch: Epochs that the inner method trains before without it.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "ATTA"
    shards: ClassVar[bool] = True
    shapes_step: ClassVar[bool] = True
    needs_source: ClassVar[bool] = True
    conflicts: ClassVar[Mapping[str, str]] = {
        "clean": "it attacks nothing, so there is nothing to carry over; use pgd-at",
        "free-at": "it carries a perturbation of its own from one replay to the next; use pgd-at or fast-at",
    }

    reset_every: int | None = 10
    start_epoch: int = 0

    def __post_init__(self) -> None:
        if self.reset_every is not None and self.reset_every < 2:
            raise InputError(
                f"carry-over reset_every is {self.reset_every}; it must be at least 2, since a reset before every epoch"
                " leaves nothing to carry over, or null for no reset"
            )
        if self.start_epoch < 0:
            raise InputError(f"carry-over start_epoch is {self.start_epoch}; it must be >= 0")

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveCarryOver":
        """Bind these settings to a model around an inner method.

        Raises:
            InputError: There is no inner method, or the attack has no room.
        """
        if attack.threat.eps == 0:
            raise InputError("carry-over has nothing to carry over with an attack of eps 0; set eps > 0")
        return LiveCarryOver(self.around(inner), settings=self, attack=attack, seed=seed)


class LiveCarryOver(LiveWrapper):
    """Carry-over bound to a model.

    What is stored lies on the device of the images, one byte (l_inf) or two (l_2) per value. The first epoch after a
    reset collects it batch by batch, because only then is known how many images there are: the device is never asked
    in a step. An image beyond those of that epoch starts afresh until the next reset.
    """

    def __init__(self, inner: Live, *, settings: CarryOver, attack: Attack, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.attack = attack
        self.epoch = 0
        self._format = _FORMATS[attack.threat.norm]
        self._scale = attack.threat.eps / _LEVELS if attack.threat.norm == "linf" else 1.0
        self._stored: Tensor | None = None  # [N + 1, C, H, W]; the last row stays empty, for images that are not stored
        self._own = torch.zeros(0, dtype=torch.bool)  # [N + 1]: which rows this process stored, and no other knows yet
        self._collected: list[tuple[Tensor, Tensor]] = []  # rows [B] and values [B, C, H, W], until there is a table

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Drop all perturbations when a reset is due; see ``Live.epoch_start``."""
        self.epoch = epoch
        every, begun = self.settings.reset_every, epoch - self.settings.start_epoch
        if every is not None and begun % every == 0:
            self._stored, self._collected = None, []
        elif self._stored is None:
            self._collect()
        self._exchange()
        return super().epoch_start(epoch, probe, optimizer=optimizer)

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Let the inner method go on from what is stored, and store what it finds.

        Raises:
            InputError: The batch does not tell which images it holds.
        """
        if self.epoch < self.settings.start_epoch:
            return self.inner.perturb(batch, generator=generator)
        if batch.index is None:
            raise InputError(
                "carry-over stores a perturbation for each image, and this batch has no index; call live(x, y, index)"
                " with each image's place in the data set"
            )
        rows = batch.index.to(batch.x.device, non_blocking=True)
        if self._stored is None:
            before = batch.x.new_full(batch.x.shape, self._format.none, dtype=self._format.dtype)
            adv = self.inner.perturb(batch, generator=generator)
        else:
            rows = torch.where(rows < len(self._stored) - 1, rows, -1)
            before = self._stored[rows]
            start = self._start(batch.x, self._to_batch(before, batch.source), generator)
            adv = self.inner.perturb(batch._replace(start=start), generator=generator)
        found = self._to_stored(before, self._encode(_perturbed(adv) - batch.x), batch.source)
        if self._stored is None:
            tracked = (found != self._format.none).flatten(1).any(dim=1)
            self._collected.append((torch.where(tracked, rows, -1), found))
        else:
            self._stored[rows] = found
            self._stored[-1] = self._format.none
            self._own[rows] = True
        return adv

    def _start(self, x: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
        """``x`` plus the stored values, plus random ones where there are none; inside ball and box."""
        threat = self.attack.threat
        ball, radius = BALLS[threat.norm], x.new_full((len(x), *[1] * (x.dim() - 1)), threat.eps)
        random = getattr(self.attack, "random_start", True)
        fresh = ball.sample(x, radius, generator) if random else gaussian_start(x, generator) - x
        delta = torch.where(values == self._format.none, fresh, values.to(x.dtype) * self._scale)
        return (x + ball.project(delta, radius)).clamp_(*threat.bounds)

    def _encode(self, delta: Tensor) -> Tensor:
        delta = delta.nan_to_num(nan=0.0)  # of a spoiled step, which must not come back in the next epoch
        if self._format.dtype == torch.int8:
            delta = (delta / self._scale).round_().clamp_(-_LEVELS, _LEVELS)
        return delta.to(self._format.dtype)

    def _to_batch(self, stored: Tensor, source: Tensor | None) -> Tensor:
        """Move stored values to where their pixels are in the batch."""
        if source is None:
            return stored
        framed, places = self._framed(stored, source)
        return framed.gather(2, places).view(stored.shape)

    def _to_stored(self, before: Tensor, values: Tensor, source: Tensor | None) -> Tensor:
        """Move values of the batch back to where their pixels are stored; the others keep their value."""
        if source is None:
            return values
        framed, places = self._framed(before, source)
        return framed.scatter(2, places, values.flatten(2))[..., :-1].view(before.shape)

    def _framed(self, stored: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Stored values [B, C, H*W + 1], with a last one for pixels that are nowhere, and each pixel's place there."""
        num_pixels = source[0].numel()
        places = torch.where(source < 0, num_pixels, source).flatten(1)[:, None].expand(-1, stored.shape[1], -1)
        return F.pad(stored.flatten(2), (0, 1), value=self._format.none), places

    def _collect(self) -> None:
        """Lay what was collected into a table, by image; a process that goes on with a resumed run may have nothing."""
        mine = None
        if self._collected:
            mine = int(torch.cat([rows for rows, _ in self._collected]).max()), self._collected[0][1].shape[1:]
        everyones = processes.gathered(mine)
        if not everyones:
            return
        num_rows, device = 2 + max(last for last, _ in everyones), next(self.model.parameters()).device
        size = (num_rows, *everyones[0][1])
        self._stored = torch.full(size, self._format.none, dtype=self._format.dtype, device=device)
        self._own = torch.zeros(num_rows, dtype=torch.bool, device=device)
        for rows, values in self._collected:
            self._stored[rows] = values
            self._own[rows] = True
        self._stored[-1] = self._format.none  # images that are not stored have row -1
        self._collected = []

    def _exchange(self) -> None:
        """Let each process have what all of them stored since: no two saw the same image."""
        if self._stored is None or processes.count() == 1:
            return
        self._own[-1] = False
        found = torch.where(self._own.view(-1, *[1] * (self._stored.dim() - 1)), self._stored, 0)
        someones = self._own.to(torch.uint8)
        processes.add_up(found)
        processes.add_up(someones)
        self._stored = torch.where((someones > 0).view(-1, *[1] * (found.dim() - 1)), found, self._stored)
        self._own.zero_()

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``; it holds everything that is stored."""
        self._exchange()
        stored = None if self._stored is None else self._stored.clone()
        mine = [(rows.cpu(), values.cpu()) for rows, values in self._collected]
        collected = [pair for pairs in processes.gathered(mine) for pair in pairs]
        return {**super().state_dict(), "epoch": self.epoch, "stored": stored, "collected": collected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        device = next(self.model.parameters()).device
        self.epoch = state["epoch"]
        self._stored = None if state["stored"] is None else state["stored"].clone().to(device)
        self._own = torch.zeros(0 if self._stored is None else len(self._stored), dtype=torch.bool, device=device)
        mine = state["collected"][processes.rank() :: processes.count()]
        self._collected = [(rows.to(device), values.to(device)) for rows, values in mine]


def _perturbed(adv: AdversarialBatch) -> Tensor:
    """The perturbed images: of the outermost method that perturbed any."""
    while adv.x_adv is adv.batch.x and adv.inner is not None:
        adv = adv.inner
    return adv.x_adv
