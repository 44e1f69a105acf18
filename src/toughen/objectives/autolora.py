"""AutoLoRA (Xu et al. 2024): low-rank adapters learn the clean images, the network itself the adversarial ones."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from toughen import processes
from toughen.attacks import Attack
from toughen.attacks.probabilities import kl_divergence, log_probabilities
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.layers import ModelView, map_layers
from toughen.layers.taps import mode
from toughen.objectives.cross_entropy import cross_entropy, labelled_mean
from toughen.objectives.objective import METHODS, LiveObjective, Objective
from toughen.objectives.settings import check_weight
from toughen.objectives.start import search_start
from toughen.rng import generator
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput


@METHODS.register("autolora")
@dataclass(frozen=True, kw_only=True)
class AutoLoRA(Objective):
    """Robust fine-tuning in two branches: ``l1 CE(p_nat, y) + (1 - l1) CE(p_adv, y) + l2 KL(p_nat || p_adv)``.

    p_nat is what the network with its adapters says of x; this branch trains the adapters and the classifier alone.
    p_adv is what the network without them says of x', found by the attack on cross-entropy from x + 0.001 N(0, 1);
    this branch trains everything but the adapters. The KL divergence trains both sides. The weights follow from the
    clean accuracy a of the natural branch, in [0, 1]: ``l1 = 1 - a`` and ``l2 = kl_scale * a``. What is deployed is the
    network without adapters.

    The adapter of a convolution adds ``alpha / rank * reshape(B A)`` to its weight [o, i/g, k, k], with A
    [rank k, i k] ~ N(0, 1) and B [o/g k, rank k] = 0, so that both branches begin alike. A convolution whose weight is
    computed (parametrizations) gets none, nor does a classifier that is a convolution.

    Differences from the official code: it measures a on all training images, at the start of an epoch and about four
    times within; here a is measured on ``probe_size`` of them at the start of each epoch. It leaves the first
    convolution of its networks without an adapter; here every one has its own.

    Args:
        rank: r of the adapters, at least 1.
        alpha: Scale of the adapters, times rank; > 0.
        kl_scale: Largest weight of the KL divergence, reached at an accuracy of 1; >= 0.
        probe_size: Training images on which a is measured, at least 1.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "AutoLoRA"  # as the rows of the paper's tables spell it
    conflicts: ClassVar[Mapping[str, str]] = {
        "lora": "it freezes the weights that the adversarial branch has to train; leave one of the two out"
    }

    rank: int = 8
    alpha: float = 1.0
    kl_scale: float = 6.0
    probe_size: int = 1000

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("probe_size", self.probe_size)):
            if value < 1:
                raise InputError(f"autolora {name} is {value}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"autolora alpha is {self.alpha!r}; it must be a finite number > 0")
        check_weight(self.kl_scale, where="autolora kl_scale")

    def search_start(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See ``Objective.search_start``."""
        return search_start(batch, "gaussian", generator)

    def loss(self, view: ModelView, adv: AdversarialBatch) -> StepOutput:
        """Refuse: adapters and weights of the terms exist once the method is bound, see ``LiveAutoLoRa.loss``.

        Raises:
            InputError: Always.
        """
        raise InputError("autolora has no loss without its adapters; bind it to a model first: AutoLoRA().bind(...)")

    def bind(self, model: nn.Module, *, attack: Attack, seed: int = 0) -> "LiveAutoLoRa":
        """Bind these settings to a model and make its adapters, which the optimizer must hold."""
        return LiveAutoLoRa(model, settings=self, attack=attack, seed=seed)


class LiveAutoLoRa(LiveObjective):
    """AutoLoRA bound to a model.

    Attributes:
        l1: Weight of the natural cross-entropy, in [0, 1]; None until an epoch has started.
        l2: Weight of the KL divergence, in [0, kl_scale]; likewise.
    """

    def __init__(self, model: nn.Module, *, settings: AutoLoRA, attack: Attack, seed: int = 0) -> None:
        super().__init__(model, objective=settings, attack=attack, seed=seed)
        self.settings = settings
        self.l1: float | None = None
        self.l2: float | None = None
        self._adapters = _adapters(model, settings, seed)  # by the name of the weight that each changes
        self._classifier: frozenset[str] | None = None  # names of its parameters

    def natural(self, x: Tensor) -> Tensor:
        """Return the logits [B, K] of the natural branch, where only the adapters and the classifier are trained."""
        assert self._classifier is not None
        # the model is asked anew in each call: an outer method may lend it other weights for a while
        weights = {
            name: weight if name in self._classifier else weight.detach()
            for name, weight in self.model.named_parameters()
        }
        for name in self._adapters.keys() - self._classifier:
            weights[name] = weights[name] + self._adapters[name].change(weights[name])
        logits: Tensor = functional_call(self.model, weights, (x,))
        return logits

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return the weighted loss of both branches.

        Raises:
            InputError: No epoch has started yet.
        """
        if self.l1 is None or self.l2 is None:
            raise InputError("autolora has no weights yet: call epoch_start(epoch, probe) before the first batch")
        y = adv.batch.y
        natural, adversarial = self.natural(adv.batch.x), self.view(adv.x_adv)
        natural_ce, adversarial_ce = cross_entropy(natural, y), cross_entropy(adversarial, y)
        # an image without a label has not been attacked either
        divergence = labelled_mean(kl_divergence(log_probabilities(natural), log_probabilities(adversarial)), y)
        loss = self.l1 * natural_ce + (1 - self.l1) * adversarial_ce + self.l2 * divergence
        terms = {"natural_ce": natural_ce, "adv_ce": adversarial_ce, "kl": divergence}
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})

    # -- the weights of the terms -----------------------------------------------------------------

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Measure the clean accuracy of the natural branch, which decides the weights of the terms.

        Raises:
            InputError: ``probe`` holds no labelled image, or the classifier of the model can't be told.
        """
        right = count = 0
        for x, y in _first_images(probe, self.settings.probe_size):
            self._find_classifier(x)
            with torch.no_grad(), mode(self.model, training=False):
                right += int((self.natural(x.to(self._device)).argmax(dim=1) == y.to(self._device)).sum())
            count += int((y >= 0).sum())
        if not count:
            raise InputError(
                "autolora has to measure its clean accuracy but the probe is empty: pass some labelled training images"
                " as (x, y) pairs"
            )
        accuracy = processes.mean(right / count)
        self.l1, self.l2 = 1 - accuracy, self.settings.kl_scale * accuracy
        return None

    def _find_classifier(self, example: Tensor) -> None:
        if self._classifier is not None:
            return
        layers = [layer for layer in map_layers(self.model, example[:1].to(self._device)) if layer.classifier]
        if not layers:
            raise InputError(
                f"autolora trains the classifier in both branches, and none of the layers of"
                f" {type(self.model).__name__} returns its logits; see `toughen list layers MODEL`"
            )
        self._classifier = frozenset(name for layer in layers for name in layer.parameters)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- what the loop asks -----------------------------------------------------------------------

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        self._find_classifier(example)
        assert self._classifier is not None
        if not self._adapters.keys() - self._classifier:
            raise InputError(
                f"autolora adapts convolutions, and {type(self.model).__name__} has none before its classifier; use a"
                " convolutional network, or trades"
            )

    @property
    def probe_size(self) -> int:
        """See ``Live.probe_size``."""
        return self.settings.probe_size

    def facts(self) -> dict[str, float]:
        """See ``Live.facts``."""
        return {} if self.l1 is None or self.l2 is None else {"l1": self.l1, "l2": self.l2}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the factors of the adapters, by name."""
        pairs = self._adapters.items()
        return {f"{name}.{side}": getattr(adapter, side) for name, adapter in pairs for side in ("a", "b")}

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        return {
            **super().state_dict(),
            "l1": self.l1,
            "l2": self.l2,
            "classifier": None if self._classifier is None else sorted(self._classifier),
            "adapters": {name: factor.detach().clone() for name, factor in self.own_parameters().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``."""
        super().load_state_dict(state)
        self.l1, self.l2 = state["l1"], state["l2"]
        self._classifier = None if state["classifier"] is None else frozenset(state["classifier"])
        with torch.no_grad():
            for name, factor in self.own_parameters().items():
                factor.copy_(state["adapters"][name])


def _first_images(probe: Batches, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first ``count`` images of the probe, in small batches: it may come as one that would fill the memory."""
    missing = count
    for x, y, *_ in probe:
        for start in range(0, min(len(x), missing), 128):
            rows = slice(start, min(start + 128, missing))
            yield x[rows], y[rows]
        missing -= len(x)
        if missing <= 0:
            return


@dataclass(frozen=True)
class _Adapter:
    """The factors of a low-rank change of one weight."""

    a: nn.Parameter  # [r k, i k]
    b: nn.Parameter  # [o/g k, r k]
    scale: float

    def change(self, weight: Tensor) -> Tensor:
        """Return what is to be added to ``weight``."""
        return self.scale * (self.b @ self.a).view_as(weight)


def _adapters(model: nn.Module, settings: AutoLoRA, seed: int) -> dict[str, _Adapter]:
    """Make an adapter for each convolution that owns its weight; the same numbers on every device."""
    draw = generator(seed, "adapters")
    own = dict(model.named_parameters())
    found: dict[str, _Adapter] = {}
    for name, module in model.named_modules():
        weight = own.get(f"{name}.weight")
        if weight is None or not isinstance(module, _ConvNd):
            continue
        first, others, height, *width = (*weight.shape,)  # [o, i/g, k, ...]; of transposed ones [i, o/g, k, ...]
        inner = settings.rank * height
        a = torch.randn(inner, others * module.groups * math.prod(width), generator=draw).to(weight)
        b = weight.new_zeros(first // module.groups * height, inner)
        found[f"{name}.weight"] = _Adapter(nn.Parameter(a), nn.Parameter(b), settings.alpha / settings.rank)
    return found
