"""Projected gradient ascent (Madry et al. 2018) on any goal: the inner maximisation of adversarial training."""

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from toughen.attacks.goals import CrossEntropy, FeatureShift, Goal, Objective
from toughen.attacks.recording import can_record, recorded
from toughen.attacks.threat import BALLS
from toughen.errors import InputError
from toughen.layers import ModelView, norms_folded
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.rng import from_global_state
from toughen.types import ThreatModel

ModelMode = Literal["eval", "unchanged"]
Found = tuple[Tensor, Tensor]  # perturbed images, and what the goal says of each
Search = Callable[[Tensor], Found]


class Attack(Protocol):
    """Training-grade: always returns a perturbed batch inside the threat model, leaves the model as found."""

    @property
    def threat(self) -> ThreatModel:
        """The perturbations that this attack may use."""
        ...

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal | None = None,
        eps: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return x_adv, detached, of the shape of ``x``."""
        ...


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent inside a threat model.

    Args:
        threat: The allowed perturbations.
        step_size: Length of one step, in pixel units and in the norm of ``threat``.
        steps: Number of steps, at least 1.
        random_start: Start uniformly inside the ball (and the image box) rather than at ``x``.
        keep: ``"last"`` returns the last iterate; ``"worst"`` the iterate with the largest goal, start included.
        restarts: Independent starts, at least 1; the one with the largest goal is returned for each sample.
        model_mode: ``"eval"`` attacks the model as it will be used; ``"unchanged"`` leaves every module's mode, so
            that batch norm in train mode uses batch statistics (its running statistics are put back afterwards).
        momentum: Of the step's direction, >= 0 (Dong et al. 2018): gradients, each divided by its mean magnitude, add
            up with this factor on their sum so far; 0 is plain PGD.
        fold_norms: Compute batch norm in eval mode by the convolution before it: the same up to rounding, in less time
            and memory, see ``norms_folded``.
        cuda_graph: On a CUDA device, record the whole search once as a CUDA graph and replay it: the same, with less
            for the host to do. The recording keeps the memory of an attack. Elsewhere it changes nothing.

    Raises:
        InputError: A setting is out of its range.
    """

    threat: ThreatModel
    step_size: float
    steps: int = 10
    random_start: bool = True
    keep: Literal["last", "worst"] = "last"
    restarts: int = 1
    model_mode: ModelMode = "eval"
    momentum: float = 0.0
    fold_norms: bool = True
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.step_size, float | int) and math.isfinite(self.step_size) and self.step_size >= 0):
            raise InputError(f"step_size is {self.step_size!r}; it must be a finite number >= 0, in pixel units")
        for name, value in (("steps", self.steps), ("restarts", self.restarts)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"attack {name} is {value!r}; it must be a whole number, at least 1")
        if not (math.isfinite(self.momentum) and self.momentum >= 0):
            raise InputError(f"attack momentum is {self.momentum!r}; it must be a finite number >= 0")
        if self.keep not in ("last", "worst"):
            raise InputError(f"attack keep is {self.keep!r}; allowed: last, worst")
        if self.model_mode not in ("eval", "unchanged"):
            raise InputError(f"attack model_mode is {self.model_mode!r}; allowed: eval, unchanged")
        if self.cuda_graph and self.model_mode != "eval":
            raise InputError("attack cuda_graph needs model_mode='eval': a recording can't put batch statistics back")
        if self.restarts > 1 and not self.random_start:
            raise InputError(f"{self.restarts} restarts without random_start would all be the same; set one of them")

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        goal: Goal | None = None,
        eps: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturb a batch so that ``goal`` grows, and leave the model exactly as found.

        Args:
            model: Maps [B, ...] images to [B, K] logits; its modes, gradients, buffers, hooks and the global random
                state are the same after the call.
            x: [B, ...], float, inside ``threat.bounds``.
            y: [B], int64 labels.
            goal: What to maximise; None is cross-entropy.
            eps: [B], >= 0, a budget for each sample instead of ``threat.eps``; the step size scales along with it.
            start: [B, ...], where the first search begins instead of ``random_start``; it may lie outside the box, as
                the Gaussian start of TRADES does, since every step leads back.
            generator: Source of the random start, on the device of ``x``. None uses a copy of torch's global
                random state, so repeated calls start alike until that state moves on.

        Returns:
            x_adv, detached, inside the ball and the box.

        Raises:
            InputError: ``eps`` is given but ``threat.eps`` is 0.
        """
        if eps is not None and self.threat.eps == 0:
            raise InputError("a budget per sample needs a threat model with eps > 0, to which step_size refers")
        goal = CrossEntropy() if goal is None else goal
        generator = from_global_state(x.device) if generator is None else generator
        x = x.detach()
        per_sample = (-1, *[1] * (x.dim() - 1))
        budget = torch.full((x.shape[0],), self.threat.eps, device=x.device) if eps is None else eps
        radius = budget.to(x).view(per_sample)
        step_size = (
            torch.full_like(radius, self.step_size) if eps is None else self.step_size / self.threat.eps * radius
        )
        with self._as_found(model), ExitStack() as stack:
            if self.cuda_graph and can_record(x):
                search = self._recorded_search(model, x, y, goal, radius, step_size)
            else:
                stack.enter_context(self._folded(model, x, goal))
                search = partial(self._search, goal.bind(ModelView(model), x, y), x, radius, step_size)
            best = search(self._begin(x, radius, start, generator))
            for _ in range(self.restarts - 1):
                best = _worse(*best, *search(self._begin(x, radius, None, generator)))
        return best[0]

    def _recorded_search(
        self, model: nn.Module, x: Tensor, y: Tensor, goal: Goal, radius: Tensor, step_size: Tensor
    ) -> Search:
        """``_search`` from a recording, for which the features that a goal was given are an input like the images."""
        _check_recognisable(goal)
        given = goal.clean or {} if isinstance(goal, FeatureShift) else {}

        def search(begin: Tensor, x: Tensor, y: Tensor, radius: Tensor, step_size: Tensor, *features: Tensor) -> Found:
            seen = goal
            if isinstance(goal, FeatureShift) and given:
                seen = replace(goal, clean=dict(zip(given, features, strict=True)))
            with self._folded(model, x, goal):  # inside: weights are folded anew in each replay
                return self._search(seen.bind(ModelView(model), x, y), x, radius, step_size, begin)

        key, others = (self, goal, tuple(given)), (x, y, radius, step_size, *given.values())
        return lambda begin: recorded(model, key, search, (begin, *others))

    def _begin(self, x: Tensor, radius: Tensor, start: Tensor | None, generator: torch.Generator) -> Tensor:
        """Where a search begins."""
        ball = BALLS[self.threat.norm]
        if start is not None:
            start = start.detach()
            # with "worst" the start itself may be returned
            return (x + ball.project(start - x, radius)).clamp_(*self.threat.bounds) if self.keep == "worst" else start
        return (x + ball.sample(x, radius, generator)).clamp_(*self.threat.bounds) if self.random_start else x.clone()

    def _search(self, objective: Objective, x: Tensor, radius: Tensor, step_size: Tensor, begin: Tensor) -> Found:
        """One start: the iterate kept, and its goal ([B]; -inf where nobody will compare it)."""
        ball = BALLS[self.threat.norm]
        per_sample = (-1, *[1] * (x.dim() - 1))
        x_adv = best = begin
        best_value = torch.full((x.shape[0],), -math.inf, device=x.device)
        velocity = torch.zeros_like(x)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_(True)  # a new tensor: ``best`` may be this very iterate
            with torch.enable_grad():
                value = objective(x_adv)
                (gradient,) = torch.autograd.grad(value.sum(), x_adv)
            x_adv = x_adv.detach()
            if self.keep == "worst":
                best, best_value = _worse(best, best_value, x_adv, value.detach())
            if self.momentum:
                # the floor keeps a sample without gradient where it is, instead of 0/0
                size = gradient.abs().flatten(1).mean(dim=1).clamp_min(torch.finfo(x.dtype).tiny).view(per_sample)
                gradient = velocity = self.momentum * velocity + gradient / size
            delta = ball.project(x_adv + step_size * ball.ascend(gradient) - x, radius)
            x_adv = (x + delta).clamp_(*self.threat.bounds)
        if self.keep == "last" and self.restarts == 1:
            return x_adv, best_value
        with torch.no_grad():
            value = objective(x_adv)
        return _worse(best, best_value, x_adv, value) if self.keep == "worst" else (x_adv, value)

    def _folded(self, model: nn.Module, x: Tensor, goal: Goal) -> AbstractContextManager[None]:
        return norms_folded(model, x, keep=getattr(goal, "layers", ())) if self.fold_norms else nullcontext()

    @contextmanager
    def _as_found(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(without_weight_gradients(model))
            if self.model_mode == "eval":
                stack.enter_context(mode(model, training=False))
            stack.enter_context(buffers_kept(model))
            stack.enter_context(random_state_kept(model))
            yield


def _worse(a: Tensor, value_a: Tensor, b: Tensor, value_b: Tensor) -> Found:
    """Per sample, the images whose goal is larger; the first on a tie."""
    better = value_b > value_a
    mask = better.view(-1, *[1] * (a.dim() - 1))
    return torch.where(mask, b, a), torch.where(better, value_b, value_a)


def _check_recognisable(goal: Goal) -> None:
    if not isinstance(goal, Hashable):
        raise InputError(
            f"attack cuda_graph recognises a goal by its value, and {type(goal).__name__} has none that stays;"
            " make it a frozen dataclass, or set cuda_graph=False"
        )
