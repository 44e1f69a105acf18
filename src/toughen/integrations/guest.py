"""A method as a guest in somebody else's trainer: bound to the network, hooked to the optimizer, with its state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.methods import Stack, Wrapper
from toughen.objectives import Live, Objective
from toughen.rng import generator
from toughen.types import StepOutput, check_images

AnyMethod = Objective | Wrapper | Stack
Pairs = Iterable[tuple[Tensor, Tensor]]


class Guest:
    """What every trainer that is not ours has to do for a method, apart from its own hooks.

    Args:
        method: Settings.
        model: The network: images in [0, 1] go in, logits come out.
        attack: Finds the perturbations.
        host: Whose loop it is, for messages, for example ``"Lightning"``.
        seed: Of random starts and of the images that are measured.

    Raises:
        InputError: The method asks for more of a loop than a foreign one does.
    """

    def __init__(self, method: AnyMethod, model: nn.Module, *, attack: Attack, host: str, seed: int) -> None:
        _check_method(method, host)
        self.live: Live = method.bind(model, attack=attack, seed=seed)
        own, several = bool(self.live.own_parameters()), self.live.replays > 1
        if own or several:
            self.live.release()
            what = "trains parameters of its own" if own else "uses each batch several times"
            raise InputError(f"{method.label} {what}, and {host} knows nothing of it; leave it to `toughen train`")
        self.seed = seed
        self.epoch: int | None = None  # the last one that was begun
        self.selections: dict[int, Selection] = {}
        self._rates: list[Any] = []  # of the optimizer's groups, as scheduled
        self._handles: list[Any] = []
        self._looked = self._left = False

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Perturb a batch and return the loss on it.

        Raises:
            InputError: The images of the first batch are not in [0, 1].
        """
        if not self._looked:
            check_images(x, (0.0, 1.0))
            self._looked = True
        return self.live(x, y)

    def attach(self, optimizer: torch.optim.Optimizer, *, where: str) -> None:
        """Scale the rate for the length of each step, and let the method know of it.

        Args:
            optimizer: Of the loop.
            where: It is made, for messages.

        Raises:
            InputError: It does not hold all parameters of the network.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, parameter in self.live.named_parameters().items() if id(parameter) not in held]
        if lacking:
            raise InputError(
                f"the optimizer lacks {len(lacking)} parameters of the network, such as {lacking[0]}; give it all of"
                f" them in {where}: the method freezes what is not to train"
            )
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._after_step(optimizer)),
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.live.lr_scale

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.live.step_end()

    def epoch_start(
        self, epoch: int, probe: Callable[[int], Pairs], optimizer: torch.optim.Optimizer | None
    ) -> Selection | None:
        """Do what the method does before an epoch, unless a checkpoint is from inside of it.

        Args:
            epoch: From 0.
            probe: Returns at least so many training images.
            optimizer: Of the loop.
        """
        if epoch == self.epoch:
            return None
        size = self.live.probe_size
        selection = self.live.epoch_start(epoch, probe(size) if size else (), optimizer=optimizer)
        if selection is not None:
            self.selections[epoch] = selection
        self.epoch = epoch
        return selection

    def chosen(self, count: int, among: int, epoch: int) -> list[int]:
        """Return positions of images to measure, at random and the same in all processes."""
        return torch.randperm(among, generator=generator(self.seed, "probe", epoch))[:count].tolist()

    def trains(self) -> tuple[bool, ...]:
        """Return which parameters ask for a gradient now."""
        return tuple(parameter.requires_grad for parameter in self.live.parameters())

    def detach(self) -> None:
        """Give the optimizer back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def leave(self) -> None:
        """Give network and optimizer back as before, once."""
        self.detach()
        if not self._left:
            self.live.release()
        self._left = True

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which ``load_state_dict`` continues exactly."""
        return {"epoch": self.epoch, "method": self.live.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; the weights are loaded before."""
        self.epoch = state["epoch"]
        self.live.load_state_dict(state["method"])


def given_first(probe: Pairs, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches of images that the user gives, as many as are needed."""
    found: list[tuple[Tensor, Tensor]] = []
    for x, y, *_ in probe:
        found.append((x, y))
        if sum(len(labels) for _, labels in found) >= count:
            break
    return found


def _check_method(method: AnyMethod, host: str) -> None:
    for member in method.methods if isinstance(method, Stack) else (method,):
        if getattr(member, "lr", "continue") == "restart" and getattr(member, "start_epoch", 0):
            raise InputError(f"{member.label} lr='restart' has no effect on {host}'s schedulers; set lr='continue'")
