"""LoRA for convolutions (ConvLoRA, Aleem et al. 2024): the weights stay, low-rank changes of them are trained."""

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError, check_choices, unknown
from toughen.layers import NormStats, map_layers
from toughen.layers.low_rank import LowRankForm, adaptable, adapters, attach_adapters, merge_adapters, originals
from toughen.methods.clat import CLAT
from toughen.methods.wrapper import LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live, Method
from toughen.rng import generator
from toughen.types import AdversarialBatch, Batch, Batches, StepOutput

PLAIN = "it averages the plain weights that the adapters amount to"


@METHODS.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Wrapper):
    """Low-rank adaptation: W becomes ``W + (alpha / rank) * reshape(B A)``, and from ``start_epoch`` on A and B train.

    The loss is the inner method's. Until ``start_epoch`` it trains the weights as if there were no adapters; from then
    on the weights and biases are frozen. B begins at zero, so nothing jumps. What is deployed, checkpointed and
    averaged is the plain network with the adapters merged.

    The official code replaces convolutions by new ones and merges whenever the model changes to eval mode, which
    attacks do in every step; here the layers stay and nothing is merged but copies. There is no published recipe for
    adversarial training; rank and alpha follow Hu et al. (2021), batch norm follows CLAT.

    Args:
        rank: r, at least 1.
        alpha: Scale of the change, times rank; > 0. None is ``rank``: the change is B A itself.
        form: Of the factors, for a weight [o, i/g, k, k]. ``"conv"``: A [r k, i k] and B [o/g k, r k], the paper's.
            ``"1x1"``: a convolution to r channels and a pointwise one from there, as in peft.
        start_epoch: Epochs that the inner method trains before without adapters.
        layers: Shell patterns of qualified names of convolutions and linear layers; empty is every convolution.
            ``("*",)`` adds the linear layers, the classifier among them.
        classifier: Whether the parameters of the classifier train too, but for a weight that has an adapter.
        norm_affine: Whether scale and shift of batch norm train, as in the official code ("AdaBN").
        norm_stats: Batch-norm statistics from ``start_epoch`` on: ``"frozen"``; ``"update"`` as in the official code.

    Raises:
        InputError: A setting is out of its range.
    """

    label: ClassVar[str] = "LoRA"
    conflicts: ClassVar[Mapping[str, str]] = {
        "autolora": "it brings adapters of its own and trains the weights that LoRA freezes; leave one of the two out",
        "rift": "it tunes the weights of a layer, which LoRA freezes; leave one of the two out",
    }
    before: ClassVar[Mapping[str, str]] = {
        "clat": "CLAT chooses among the layers as LoRA leaves them, and trains their adapters",
        "swa": PLAIN,
        "ema": PLAIN,
    }

    rank: int = 8
    alpha: float | None = None
    form: LowRankForm = "conv"
    start_epoch: int = 0
    layers: tuple[str, ...] = ()
    classifier: Literal["frozen", "train"] = "frozen"
    norm_affine: Literal["train", "frozen"] = "train"
    norm_stats: Literal["frozen", "update"] = "frozen"

    def __post_init__(self) -> None:
        check_choices(self, where="lora")
        if self.rank < 1:
            raise InputError(f"lora rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError(f"lora alpha is {self.alpha!r}; it must be a finite number > 0, or null for rank")
        if self.start_epoch < 0:
            raise InputError(f"lora start_epoch is {self.start_epoch}; it must be >= 0")

    def check_stack(self, methods: Sequence[Method]) -> None:
        """See ``Method.check_stack``."""
        for method in methods[methods.index(self) :]:
            if isinstance(method, CLAT) and method.start_epoch < self.start_epoch:
                raise InputError(
                    f"{method.label} begins at epoch {method.start_epoch} and {self.label} at {self.start_epoch}, so"
                    f" CLAT would choose weights that LoRA then freezes; set clat start_epoch >= {self.start_epoch}, or"
                    f" lora start_epoch <= {method.start_epoch}"
                )
            if isinstance(method, CLAT) and method.base == "inner" and self._holds(method.norm_stats):
                raise InputError(
                    f"{method.label} has norm_stats={method.norm_stats!r} and {self.label} 'frozen', which holds in the"
                    " inner loss, so no statistics would move; set lora norm_stats='update'"
                )

    def _holds(self, outer: NormStats) -> bool:
        """Whether batch norm stands still here although an outer method wants it to move."""
        return self.norm_stats == "frozen" and outer != "frozen"

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveLoRA":
        """Bind these settings to a model around an inner method, and attach the adapters.

        Raises:
            InputError: There is no inner method, a pattern matches no layer, or the model has nothing to adapt.
        """
        return LiveLoRA(self.around(inner), settings=self, seed=seed)


class LiveLoRA(LiveWrapper):
    """LoRA bound to a model, whose layers have adapters until ``release``."""

    def __init__(self, inner: Live, *, settings: LoRA, seed: int = 0) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.started = False
        self._classifier: tuple[str, ...] = ()  # the layers that return logits, where they are to train
        self._asked = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        attach_adapters(
            self.model,
            _matching(self.model, settings.layers),
            rank=settings.rank,
            alpha=settings.alpha,
            form=settings.form,
            generator=generator(seed, "adapters"),
        )
        if settings.start_epoch == 0 and settings.classifier == "frozen":
            self._start()
        else:
            self._wait()

    # -- what trains ------------------------------------------------------------------------------

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Freeze the weights and let the adapters train, when LoRA starts; see ``Live.epoch_start``.

        Raises:
            InputError: The classifier is to train and can't be told: the probe is empty, or no layer returns logits.
        """
        selection = super().epoch_start(epoch, probe, optimizer=optimizer)
        if not self.started and epoch >= self.settings.start_epoch:
            if self.settings.classifier == "train":
                self._classifier = self._find_classifier(next((x[:1] for x, *_ in probe), None))
            self._start()
        return selection

    def _wait(self) -> None:
        """Let everything train that did before binding, and no adapter."""
        self.started = False
        self._train_only(self._asked)

    def _start(self) -> None:
        """Let the adapters train, and of the rest only what the settings name."""
        self.started = True
        heads = (self.model.get_submodule(name) for name in self._classifier)
        further = {parameter for head in heads for parameter in head.parameters()} - set(originals(self.model).values())
        if self.settings.norm_affine == "train":
            further.update(parameter for norm in self._norms() for parameter in norm.parameters())
        factors = {parameter for adapter in adapters(self.model).values() for parameter in adapter.parameters()}
        self._train_only(factors | further & self._asked)

    def _train_only(self, due: Collection[Tensor]) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in due)
            if not parameter.requires_grad:
                parameter.grad = None

    def _find_classifier(self, example: Tensor | None) -> tuple[str, ...]:
        if example is None:
            raise InputError(
                "lora has to find the classifier but the probe is empty: pass some training images as (x, y) pairs, or"
                " set classifier='frozen'"
            )
        layers = map_layers(self.model, example.to(next(self.model.parameters()).device))
        found = tuple(layer.name for layer in layers if layer.classifier)
        if not found:
            raise InputError(
                f"lora classifier is 'train' and no layer of {type(self.model).__name__} returns its logits; set it to"
                " 'frozen'"
            )
        return found

    def _norms(self) -> list[_NormBase]:
        return [module for module in self.model.modules() if isinstance(module, _NormBase)]

    def _apply_mode(self) -> None:
        """Keep batch norm in eval mode where its statistics are frozen (after a ``model.train()`` it is not)."""
        if self.started and self.settings.norm_stats == "frozen":
            for norm in self._norms():
                norm.eval()

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """See ``Live.perturb``."""
        self._apply_mode()
        return self.inner.perturb(batch, generator=generator)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """See ``Live.loss``."""
        self._apply_mode()
        return self.inner.loss(adv)

    # -- what the loop asks -----------------------------------------------------------------------

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        if self.settings.classifier == "train":
            self._find_classifier(example)
        super().check(example)

    @property
    def selected(self) -> tuple[str, ...] | None:
        """See ``Live.selected``."""
        if not self.started:
            return super().selected
        return tuple(dict.fromkeys([*adapters(self.model), *self._classifier]))

    @property
    def probe_size(self) -> int:
        """See ``Live.probe_size``."""
        return max(1 if self.settings.classifier == "train" else 0, super().probe_size)

    def deployed(self) -> nn.Module:
        """Return a plain copy of the model with the adapters merged."""
        network = super().deployed()
        if not adapters(network):
            return network
        network = deepcopy(network).requires_grad_(True)
        merge_adapters(network)
        return network

    def release(self) -> None:
        """Merge the adapters, so that the model is plain again; see ``Live.release``."""
        merge_adapters(self.model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in self._asked)
        if self.started and self.settings.norm_stats == "frozen":
            for norm in self._norms():
                norm.train(self.model.training)
        super().release()

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``; the factors are in that of the model."""
        return {**super().state_dict(), "started": self.started, "classifier": list(self._classifier)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``; freezes what was frozen."""
        super().load_state_dict(state)
        self._classifier = tuple(state["classifier"])
        if state["started"]:
            self._start()
        else:
            self._wait()


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The layers that are to be adapted; what is frozen before binding stays as it is."""
    layers = {name: layer for name, layer in adaptable(model).items() if layer.weight.requires_grad}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise unknown("lora layer pattern", pattern, layers, hint="a pattern matches whole names, * anything")
    if patterns:
        return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
    found = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if not found:
        raise InputError(
            f"lora adapts convolutions, and {type(model).__name__} has none to train; name linear layers, for example"
            " layers=('*',)"
        )
    return found
