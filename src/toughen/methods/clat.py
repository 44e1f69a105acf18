"""CLAT: tune the few most critical layers to be less so, re-chosen every ten epochs (section 3, Algorithm 1)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack, FeatureNorm, FeatureShift, fgsm_rs
from toughen.criticality import CriticalityOptions
from toughen.criticality.selection import SELECTORS, Fixed, Selection, SelectionRule
from toughen.errors import InputError, check_choices
from toughen.layers import NormStats
from toughen.layers.taps import buffers_kept, mode, random_state_kept
from toughen.methods.critical_layers import CriticalLayers
from toughen.methods.wrapper import LiveWrapper, Wrapper
from toughen.objectives import METHODS, Live, Method, feature_loss
from toughen.objectives.cross_entropy import cross_entropy
from toughen.objectives.feature_loss import LayerGradient
from toughen.rng import generator
from toughen.types import AdversarialBatch, Batch, Batches, Features, StepOutput


@METHODS.register("clat")
@dataclass(frozen=True, kw_only=True)
class CLAT(Wrapper):
    """Criticality-leveraged adversarial training: ``min over f_S of E CE(F(x), y) + lam * L_C(f_S)`` (Eq. 6).

    Until ``start_epoch`` the inner method trains all layers. Then, and every ``every`` epochs, the criticality of all
    layers is measured on ``probe_size`` training images, the ``k`` layers that ``select`` names are trained, and all
    others are frozen bit for bit. The numbers in brackets are the rows of the list of open choices on the CLAT card.

    Args:
        k: How many layers train; None is 5 % of the selectable ones, at least 1 [26].
        lam: Weight of L_C (the paper gives none); ``"auto"`` sets it once, at the first selection, so that the weighted
            L_C is ``rho`` times the clean cross-entropy there [1].
        rho: See ``lam``.
        start_epoch: Epochs that the inner method trains before.
        every: Epochs between selections (Algorithm 1: 10); None selects once and keeps that choice (Tables 5, 6, 14).
        select: ``"top"``, ``"bottom"``, ``"random"``, ``"shape_only"``, ``"fixed"``, or any ``SelectionRule``.
        layers: Qualified names for ``select="fixed"``.
        base: What L_C is added to [19, 24]: ``"clean_ce"`` the clean cross-entropy (Eq. 6), ``"adv_ce"`` the
            cross-entropy at the perturbation of Eq. 5, ``"inner"`` the inner method's own attack and loss.
        feature_norm: How a feature difference is measured in attack and loss [2]: ``"l2"`` (Eq. 5), ``"squared"``,
            ``"rms"``, ``"dim"``, ``"relative"``.
        inner_max: The attack of Eq. 5: ``"same"`` as the run's, or one ``"fgsm-rs"`` step, which is CLAT (fast).
        clean_grad: Whether F_i(x) in L_C depends on the weights (``"keep"``, Eq. 5) or not (``"detach"``) [17].
        layer_grad: Whether the term of a layer also trains selected layers before it (``"flow"``) or not (``"own"``)
            [18].
        norm_stats: Batch-norm statistics while layers are frozen [11]: ``"frozen"``; ``"follow"``, where only the
            batch norm behind a selected layer moves; ``"update"``, where all move, as a plain ``model.train()`` would.
        norm_affine: Whether scale and shift of the batch norm behind a selected layer train too (``"follow"``) [13].
        on_reselect: Momentum at a new selection [15]: ``"staying"`` drops it except for layers that stay selected,
            ``"keep"`` touches nothing, ``"reset"`` drops all. Needs the optimizer in ``epoch_start``.
        lr: ``"continue"`` the schedule, or ``"restart"`` it when CLAT begins [16]. The loop applies it.
        lr_scale: Factor on the scheduled learning rate while CLAT is active [16]. The loop applies it.
        forward: ``"truncated"`` stops attacks, and with frozen statistics L_C too, at the deepest selected layer;
            ``"full"`` runs all: same result [30].
        clean_forward: ``"shared"`` lets attack and loss have one forward of the clean images, wherever it is the same
            in both and moves no statistics; its activations are held during the attack. ``"repeated"`` holds less, for
            more work: same result up to rounding.
        probe_size: Training images per selection, 10 to 100 in the paper (Table 10) [21].
        classifier: Whether the classifier may be selected (``"include"``) [5].
        criticality: How the index is measured [3, 4, 6-10].

    Raises:
        InputError: A setting is out of its range, or two contradict each other.
    """

    reads_unlabelled: ClassVar[bool] = True  # L_C asks for no label
    shards: ClassVar[bool] = True

    k: int | None = None
    lam: float | Literal["auto"] = "auto"
    rho: float = 0.1
    start_epoch: int = 0
    every: int | None = 10
    select: str | SelectionRule = "top"
    layers: tuple[str, ...] = ()
    base: Literal["clean_ce", "adv_ce", "inner"] = "clean_ce"
    feature_norm: FeatureNorm = "l2"
    inner_max: Literal["same", "fgsm-rs"] = "same"
    clean_grad: Literal["keep", "detach"] = "keep"
    layer_grad: LayerGradient = "flow"
    norm_stats: NormStats = "frozen"
    norm_affine: Literal["frozen", "follow"] = "frozen"
    on_reselect: Literal["staying", "keep", "reset"] = "staying"
    lr: Literal["continue", "restart"] = "continue"
    lr_scale: float = 1.0
    forward: Literal["truncated", "full"] = "truncated"
    clean_forward: Literal["shared", "repeated"] = "shared"
    probe_size: int = 100
    classifier: Literal["exclude", "include"] = "exclude"
    criticality: CriticalityOptions = field(default_factory=CriticalityOptions)

    def __post_init__(self) -> None:
        check_choices(self, where="clat")
        if self.k is not None and self.k < 1:
            raise InputError(f"clat k is {self.k}; at least 1 layer must train")
        if self.lam != "auto" and not (isinstance(self.lam, float | int) and 0 <= self.lam < math.inf):
            raise InputError(f"clat lam is {self.lam!r}; it must be a number >= 0, or 'auto'")
        if not self.rho >= 0 or not self.lr_scale >= 0:
            raise InputError(f"clat rho is {self.rho} and lr_scale {self.lr_scale}; both must be >= 0")
        if self.start_epoch < 0 or (self.every is not None and self.every < 1) or self.probe_size < 1:
            raise InputError(
                f"clat start_epoch is {self.start_epoch}, every {self.every}, probe_size {self.probe_size}; "
                "they must be >= 0, >= 1 (or null for a single selection), and >= 1"
            )
        self._name_rule()
        if self.lam == 0 and self.base != "adv_ce" and self.inner_max == "fgsm-rs":
            raise InputError("clat inner_max='fgsm-rs' has no effect with lam=0: the features are not attacked then")
        if (self.select == "fixed") != bool(self.layers):
            raise InputError("clat layers and select='fixed' go together: name the layers, or choose another rule")
        if self.layers and self.k not in (None, len(self.layers)):
            raise InputError(
                f"clat k is {self.k} but {len(self.layers)} layers are named; leave k out or make them agree"
            )
        self.rule()

    @property
    def label(self) -> str:  # type: ignore[override]  # a property of the settings here, of the class elsewhere
        """``"CLAT"`` with the loss of Eq. 6; else it says which: ``"CLAT (fast)"``, ``"CLAT (inner loss)"``, ..."""
        loss = {"clean_ce": "", "adv_ce": "adversarial CE", "inner": "inner loss"}[self.base]
        notes = [note for note in ("fast" if self.inner_max == "fgsm-rs" else "", loss) if note]
        return f"CLAT ({', '.join(notes)})" if notes else "CLAT"

    @property
    def needs_inner(self) -> str | None:
        """Why CLAT can't stand alone with these settings, or None if it can."""
        if self.start_epoch > 0:
            return f"nothing would train before start_epoch={self.start_epoch}"
        return "base='inner' has no inner loss" if self.base == "inner" else None

    def check_stack(self, methods: Sequence[Method]) -> None:
        """See ``Method.check_stack``."""
        if self.base == "inner" or self.start_epoch > 0:
            return
        for method in methods[: methods.index(self)]:
            if method.shapes_step:
                raise InputError(
                    f"{method.label} inside {self.label} would never act, since CLAT begins at epoch 0 with a loss of"
                    " its own; put it behind clat, or set clat base='inner'"
                )

    def rule(self) -> SelectionRule:
        """Return the selection rule that ``select`` and ``layers`` name."""
        if not isinstance(self.select, str):
            return self.select
        return Fixed(self.layers) if self.select == "fixed" else SELECTORS[self.select]()

    def _name_rule(self) -> None:
        """Write a rule of ours that was given as an object by its name, as a recipe would."""
        if isinstance(self.select, Fixed):
            object.__setattr__(self, "layers", tuple(self.select.layers))
            object.__setattr__(self, "select", "fixed")
        elif type(self.select) in SELECTORS.values() and not vars(self.select):
            object.__setattr__(self, "select", SELECTORS.name_of(type(self.select)))

    def bind(self, model: nn.Module, *, attack: Attack, inner: Live | None = None, seed: int = 0) -> "LiveCLAT":
        """Bind CLAT to a model, for use in any training loop.

        Args:
            model: The network.
            attack: Finds the perturbations, for the selection (at the output) and for Eq. 5 (at the features).
            inner: The method that trains before ``start_epoch``, and whose loss ``base="inner"`` keeps.
            seed: Of random starts, random selection and probes.

        Raises:
            InputError: These settings need an inner method and there is none.
        """
        if inner is None and self.needs_inner:
            raise InputError(f"CLAT stands alone but {self.needs_inner}; use stack(PGDAT(), CLAT(...))")
        return LiveCLAT(inner or _Untrained(model), settings=self, attack=attack, seed=seed)


@METHODS.register("clat-paper")
@dataclass(frozen=True, kw_only=True)
class CLATPaper(CLAT):
    """The literal reading of the paper: Eq. 6 with a lambda that you give, all batch norm in train mode.

    Args:
        lam: Weight of L_C; required, since the paper gives none.
        norm_stats: As in ``CLAT``; a plain ``model.train()`` here.
    """

    lam: float | Literal["auto"] = field()
    norm_stats: NormStats = "update"


class LiveCLAT(LiveWrapper):
    """CLAT bound to a model."""

    def __init__(self, inner: Live, *, settings: CLAT, attack: Attack, seed: int) -> None:
        super().__init__(inner, seed=seed)
        self.settings = settings
        self.critical = CriticalLayers(
            model=self.model,
            attack=attack,
            seed=seed,
            rule=settings.rule(),
            k=settings.k,
            named=settings.layers,
            classifier=settings.classifier == "include",
            start_epoch=settings.start_epoch,
            every=settings.every,
            criticality=settings.criticality,
            norm_stats=settings.norm_stats,
            norm_affine=settings.norm_affine,
        )
        self.feature_attack = attack
        if settings.inner_max == "fgsm-rs":
            self.feature_attack = fgsm_rs(attack.threat, model_mode=getattr(attack, "model_mode", "eval"))
        self.lam: float = 0.0 if settings.lam == "auto" else float(settings.lam)
        self._shares_clean = False

    # -- what trains ------------------------------------------------------------------------------

    def epoch_start(
        self, epoch: int, probe: Batches = (), *, optimizer: torch.optim.Optimizer | None = None
    ) -> Selection | None:
        """Select the layers to train, when a selection is due; see ``Live.epoch_start``.

        Raises:
            InputError: A selection is due and ``probe`` is empty, or ``k`` is larger than the number of layers.
        """
        inner = super().epoch_start(epoch, probe, optimizer=optimizer)
        if not self.critical.due(epoch):
            return inner
        images = _first_images(probe, self.settings.probe_size)
        begins, trained = self.critical.first_epoch is None, self.trainable()
        selection = self.critical.choose(images, epoch)
        self._freeze_own()
        if optimizer is not None:
            self._drop_momentum(optimizer, trained)
        self._shares_clean = processes.of_first(self._may_share_clean and self._looks_alike_in_attack(images[0]))
        if begins and self.settings.lam == "auto":
            self.lam = self._balanced_lam(images)
        return selection

    def check(self, example: Tensor) -> None:
        """See ``Live.check``."""
        self.critical.check(example)
        super().check(example)

    def _freeze_own(self) -> None:
        """Freeze the inner method's own parameters: they serve layers that are frozen now."""
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _drop_momentum(self, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
        if self.settings.on_reselect == "keep":
            return
        staying = {id(p) for p in self.trainable()} & {id(p) for p in trained}
        for parameter in list(optimizer.state):
            if self.settings.on_reselect == "reset" or id(parameter) not in staying:
                del optimizer.state[parameter]

    def _balanced_lam(self, images: tuple[Tensor, Tensor]) -> float:
        """``rho * CE_0 / L_C0`` on the probe."""
        device, part = next(self.model.parameters()).device, processes.share()
        x, y = (processes.own_rows(tensor).to(device) for tensor in images)
        at_start = distance = 0.0
        if len(x):
            x_adv = self._feature_perturb(Batch(x, y), generator(self.seed, "lam", device=device, share=part))
            with torch.no_grad(), mode(self.model, training=False):
                at_start = len(x) * float(cross_entropy(self.view(x), y))
                distance = len(x) * float(
                    feature_loss(self.view, x, x_adv, self.critical.names, norm=self.settings.feature_norm)
                )
        at_start, distance = processes.mean(at_start), processes.mean(distance)
        return self.settings.rho * at_start / max(distance, 1e-12)

    @property
    def selected(self) -> tuple[str, ...] | None:
        """See ``Live.selected``."""
        return self.critical.names or None

    @property
    def lr_scale(self) -> float:
        """See ``Live.lr_scale``."""
        return super().lr_scale * (self.settings.lr_scale if self.critical.layers else 1.0)

    @property
    def schedule_start(self) -> int:
        """See ``Live.schedule_start``."""
        return self.critical.first_epoch or 0 if self.settings.lr == "restart" else super().schedule_start

    @property
    def probe_size(self) -> int:
        """See ``Live.probe_size``."""
        return max(self.settings.probe_size, super().probe_size)

    @property
    def replays(self) -> int:
        """See ``Live.replays``."""
        return super().replays if self._keeps_inner else 1

    @property
    def _keeps_inner(self) -> bool:
        """Whether a step now is the inner method's own, L_C apart."""
        return not self.critical.layers or self.settings.base == "inner"

    def facts(self) -> dict[str, float]:
        """See ``Live.facts``."""
        return {**super().facts(), **({"lam": self.lam} if self.critical.layers else {})}

    def release(self) -> None:
        """See ``Live.release``."""
        self.critical.release()
        super().release()

    # -- what is minimised ------------------------------------------------------------------------

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Solve Eq. 5's inner problem on the selected layers, where the loss needs it."""
        if not self.critical.layers:
            return self.inner.perturb(batch, generator=generator)
        self.critical.apply_mode()
        inner = self.inner.perturb(batch, generator=generator) if self._keeps_inner else None
        if self.lam == 0 and self.settings.base != "adv_ce":
            return AdversarialBatch(batch, batch.x, inner)
        # a pass in another mode, or without its gradient, would be none for the loss
        shares = self._shares_clean and self.lam and self.model.training and torch.is_grad_enabled()
        clean = self._clean_pass(batch.x) if shares else None
        return AdversarialBatch(batch, self._feature_perturb(batch, generator, clean), inner, clean=clean)

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """Return Eq. 6: the base loss plus ``lam`` times L_C of the selected layers."""
        if not self.critical.layers:
            return self.inner.loss(adv)
        self.critical.apply_mode()
        settings, clean = self.settings, adv.clean
        if settings.base == "inner":
            assert adv.inner is not None
            base = self.inner.loss(adv.inner)
        elif settings.base == "adv_ce":
            loss = cross_entropy(self.view(adv.x_adv), adv.batch.y)
            base = StepOutput(loss, {"adv_ce": loss.detach()})
        else:
            clean = clean or self._clean_pass(adv.batch.x)
            assert clean.logits is not None
            loss = cross_entropy(clean.logits, adv.batch.y)
            base = StepOutput(loss, {"clean_ce": loss.detach()})
        if self.lam == 0:
            return base
        distance = feature_loss(
            self.view,
            adv.batch.x,
            adv.x_adv,
            self.critical.names,
            norm=settings.feature_norm,
            clean=None if clean is None else clean.values,
            clean_grad=settings.clean_grad,
            layer_grad=settings.layer_grad,
            stop_early=self._stops_early,
        )
        return StepOutput(base.loss + self.lam * distance, {**base.terms, "feature": distance.detach()})

    def _clean_pass(self, x: Tensor) -> Features:
        """F_i(x) of the selected layers, as the loss needs it, and the logits where it needs them too."""
        names = self.critical.names if self.lam else ()
        if self.settings.base == "clean_ce":
            return self.view.features(x, names)
        keep = self.settings.clean_grad == "keep" and self.settings.layer_grad == "flow"
        with torch.set_grad_enabled(torch.is_grad_enabled() and keep):
            return self.view.features(x, names, stop_early=self._stops_early)

    @property
    def _may_share_clean(self) -> bool:
        settings = self.settings
        # statistics that move, and dropout, would meet the batches in another order
        alike = settings.norm_stats == "frozen" and (settings.base == "clean_ce" or settings.forward == "truncated")
        return settings.clean_forward == "shared" and alike

    @property
    def _stops_early(self) -> bool:
        # where statistics move, every batch norm must see both batches, whatever is selected
        return self.settings.forward == "truncated" and self.settings.norm_stats == "frozen"

    def _looks_alike_in_attack(self, images: Tensor) -> bool:
        """Whether the features of a step are bit for bit those in eval mode, so that an attack can have them too."""
        x, names = images.to(next(self.model.parameters()).device), self.critical.names
        with (
            torch.no_grad(),
            mode(self.model, training=True),
            buffers_kept(self.model),
            random_state_kept(self.model),
        ):
            self.critical.apply_mode()
            in_step = self.view.features(x, names, stop_early=True).values
            with mode(self.model, training=False):
                in_attack = self.view.features(x, names, stop_early=True).values
        return all(torch.equal(in_step[name], in_attack[name]) for name in names)

    def _feature_perturb(self, batch: Batch, draw: torch.Generator, clean: Features | None = None) -> Tensor:
        goal = FeatureShift(
            layers=self.critical.names,
            norm=self.settings.feature_norm,
            stop_early=self.settings.forward == "truncated",
            clean=None if clean is None else clean.values,
        )
        return self.feature_attack(self.model, batch.x, batch.y, goal=goal, start=batch.start, generator=draw)

    # -- resuming -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """See ``Live.state_dict``."""
        return {
            **super().state_dict(),
            **self.critical.state_dict(),
            "lam": self.lam,
            "shares_clean": self._shares_clean,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Live.load_state_dict``; freezes what was frozen."""
        self.critical.forget()  # a state of before: the inner method says anew what may train
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(True)
        super().load_state_dict(state)
        self.critical.load_state_dict(state)
        if self.critical.layers:
            self._freeze_own()
        self.lam = state["lam"]
        self._shares_clean = state["shares_clean"] and self._may_share_clean  # a branch may have other settings


class _Untrained(Live):
    """What CLAT alone has before its first selection."""

    def perturb(self, batch: Batch, *, generator: torch.Generator) -> AdversarialBatch:
        """Refuse: nothing is selected.

        Raises:
            InputError: Always.
        """
        raise InputError("CLAT has selected no layers yet: call epoch_start(epoch, probe) before the first batch")

    def loss(self, adv: AdversarialBatch) -> StepOutput:
        """See ``perturb``; a loss comes after it."""
        raise AssertionError


def _first_images(probe: Batches, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of the probe, as one batch."""
    batches: list[tuple[Tensor, Tensor]] = []
    missing = count
    for x, y, *_ in probe:
        batches.append((x[:missing], y[:missing]))
        missing -= len(batches[-1][0])
        if missing <= 0:
            break
    if not batches:
        raise InputError("CLAT has to select layers but the probe is empty: pass some training images as (x, y) pairs")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
