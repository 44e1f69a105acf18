"""Analyse any model: perturb its images, watch every layer, and report how much each amplifies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from toughen import processes
from toughen.attacks import Attack
from toughen.criticality.curvature import curvature
from toughen.criticality.index import CriticalityReport, LayerCriticality, criticality
from toughen.criticality.weakness import Expectation, WeaknessNorm, WeaknessSums, weakness
from toughen.errors import InputError, check_choices
from toughen.layers import Granularity, Layer, LayerMap, ModelView, map_layers, tap
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.layers.view import samples_first
from toughen.rng import generator
from toughen.types import Batches, check_images

Measure = Literal["index", "curvature"]


@dataclass(frozen=True, kw_only=True)
class CriticalityOptions:
    """What the paper leaves open about the index (section 3.1, appendix E). The defaults are its literal reading.

    Args:
        norm: What the length of a feature difference is divided by: ``"dim"`` N_i (Eq. 2), ``"rms"`` sqrt(N_i),
            ``"none"``, ``"relative"`` the length of the clean feature.
        predecessor: F_{i-1} of Eq. 3: ``"execution"`` the layer executed before; ``"graph"`` the tensor that enters the
            layer, which is well defined where branches meet.
        first: C of the first layer: ``"literal"`` is its weakness; ``"input_ratio"`` divides by the weakness of the
            image.
        measure: ``"index"`` from feature differences (Eq. 2); ``"curvature"`` with the gradient term (Eq. 9), at the
            cost of one truncated backward pass per layer.
        expectation: ``"mean"`` of the per-sample lengths (Eq. 2), or their ``"rms"``: the norm of the whole batch.
        tapped: Where F_i is read: the layer's ``"output"``, or behind the batch ``"norm"`` that directly takes it (and
            behind the activation, where the norm module brings one, as timm's do).
        granularity: What a layer is, see ``map_layers``.
        exclude: Shell patterns of layer names that don't count, for example ``"*.shortcut.*"``, or ``"*.se.*"``: gates
            have few features, so the 1/N_i of Eq. 2 puts them first.

    Raises:
        InputError: A combination that has no meaning.
    """

    norm: WeaknessNorm = "dim"
    predecessor: Literal["execution", "graph"] = "execution"
    first: Literal["literal", "input_ratio"] = "literal"
    measure: Measure = "index"
    expectation: Expectation = "mean"
    tapped: Literal["output", "norm"] = "output"
    granularity: Granularity = "weights"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self, where="criticality")
        if self.measure == "curvature" and (self.norm == "relative" or self.predecessor == "graph"):
            raise InputError(
                "measure='curvature' differentiates layer outputs: it goes with predecessor='execution' and with "
                f"norm dim, rms or none; got predecessor={self.predecessor!r}, norm={self.norm!r}"
            )


def analyze(
    model: nn.Module,
    batches: Batches,
    attack: Attack,
    *,
    layers: LayerMap | None = None,
    options: CriticalityOptions | None = None,
    seed: int = 0,
) -> CriticalityReport:
    """Measure the criticality of every layer (Eq. 2 and 3) with one shared perturbation per image (section 3.1).

    Each batch is attacked at the model's output, then clean and perturbed images go through together in eval mode;
    each layer is reduced to one number per sample inside the forward, so memory does not grow with depth.

    Where ``torch.distributed`` is initialised, all processes must call this, each with images of its own; the sums
    are added up in float64, and all get the same report.

    Args:
        model: Any module that maps [B, ...] images to [B, K] logits; left exactly as found.
        batches: (x, y) pairs (or ``Batch``): x [B, ...] float inside the attack's bounds, y [B] int64. Together 10 to
            100 images suffice (Table 10). Tensors are moved to the model's device.
        attack: Finds the perturbation, by cross-entropy at the output.
        layers: Which layers to measure; None maps the model with the first batch.
        options: The open choices; None is the paper's literal reading.
        seed: Of the attack's random starts.

    Returns:
        The report, one row per layer in order of first execution.

    Raises:
        InputError: No batches, or images that are not finite or outside the attack's bounds.
    """
    options = options or CriticalityOptions()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: _Sums | None = None
    for number, (x, y, *_) in enumerate(batches):
        x, y = x.to(device), y.to(device)  # noqa: PLW2901
        if layers is None:
            layers = map_layers(model, x[:1], granularity=options.granularity, exclude=options.exclude)
        if sums is None:
            sums = _Sums(layers, options)
        if not len(x):  # of a batch that is dealt out to more processes than it has images
            continue
        check_images(x, attack.threat.bounds)
        draw = generator(seed, "analyze", number, device=device, share=processes.share())
        x_adv = attack(model, x, y, generator=draw)
        with (
            mode(model, training=False),
            without_weight_gradients(model),
            buffers_kept(model),
            random_state_kept(model),
        ):
            sums.watch(model, x, x_adv)
    if layers is None or sums is None:
        raise InputError("no images to analyse: the batches are empty")
    return sums.report({"attack": _describe(attack), "seed": seed, **asdict(options)})


class _Sums:
    """Everything that one analysis adds up: weakness of outputs, and of inputs where a divisor needs them."""

    def __init__(self, layers: LayerMap, options: CriticalityOptions) -> None:
        self.layers, self.options = layers, options
        self.measured = layers.measurable
        names = [layer.name for layer in self.measured]
        self.outputs = WeaknessSums(names, expectation=options.expectation)
        self.inputs = WeaknessSums(names, expectation=options.expectation)
        self.image = WeaknessSums(["image"], expectation=options.expectation)
        by_norm = options.tapped == "norm"
        self.point = {(layer.norm if by_norm and layer.norm else layer.name): layer for layer in self.measured}

    def watch(self, model: nn.Module, x: Tensor, x_adv: Tensor) -> None:
        if self.options.measure == "curvature":
            self._watch_curvature(ModelView(model), x, x_adv)
            return
        norm, pair = self.options.norm, torch.cat([x, x_adv])

        def moved(name: str, value: object) -> Tensor:
            return weakness(*samples_first(name, value, len(pair)).detach().chunk(2), norm=norm)

        def output(name: str, value: object) -> None:
            self.outputs.add(self.point[name].name, moved(name, value))

        def entering(name: str, value: object) -> None:
            self.inputs.add(name, moved(name, value))

        graph = self.options.predecessor == "graph"
        inputs = [layer.name for layer in self.measured if graph and layer.num_inputs]  # others have no index
        with torch.no_grad(), tap(model, self.point, output), tap(model, inputs, entering, side="input"):
            model(pair)
        self.image.add("image", weakness(x, x_adv, norm=norm))

    def _watch_curvature(self, view: ModelView, x: Tensor, x_adv: Tensor) -> None:
        for point, layer in self.point.items():
            with torch.no_grad():
                clean = view.features(x, [point], stop_early=True).values[point]
            self.outputs.add(layer.name, curvature(view, x, x_adv, point, clean) / self._size(layer.num_features))
        # for F(x) = x, Eq. 9 is ||d|| / ||d||
        moved = (x_adv != x).flatten(1).any(dim=1).double()
        self.image.add("image", moved / self._size(x[0].numel()))

    def _size(self, num_features: int) -> float:
        return {"dim": float(num_features), "rms": math.sqrt(num_features), "none": 1.0}[self.options.norm]

    def report(self, settings: Mapping[str, object]) -> CriticalityReport:
        for sums in (self.outputs, self.inputs, self.image):
            sums.merge_processes()
        out = {name: value for name, value in self.outputs.means().items() if math.isfinite(value)}
        entering, image = self.inputs.means(), self.image.means()["image"]
        rows: list[LayerCriticality] = []
        before: Layer | None = None
        for layer in self.layers:
            own = out.get(layer.name)
            if before is None:
                divisor = 1.0 if self.options.first == "literal" else image
            elif self.options.predecessor == "graph":
                divisor = entering.get(layer.name, 0.0)
            else:
                divisor = out[before.name]
            shape = layer.num_inputs if self.options.predecessor == "graph" else before and before.num_features
            ratio = shape / layer.num_features if before and shape else None
            rows.append(_row(layer, own, divisor, ratio, self.outputs.counts.get(layer.name, 0)))
            if own is not None:
                before = layer
        missing = (name for name in self.outputs.names if name not in out)
        lost = [f"{name}: its features are not finite, or it did not run" for name in missing]
        settings = {**settings, "num_samples": self.image.counts["image"]}
        return CriticalityReport(tuple(rows), (*self.layers.notes(), *lost, *_dead(rows)), settings)


def _row(
    layer: Layer, weakness: float | None, divisor: float, shape_ratio: float | None, num_samples: int
) -> LayerCriticality:
    return LayerCriticality(
        index=layer.index,
        name=layer.name,
        num_features=layer.num_features,
        num_parameters=layer.num_parameters,
        weakness=weakness,
        criticality=criticality(weakness, divisor),
        shape_ratio=shape_ratio,
        num_samples=num_samples,
        classifier=layer.classifier,
    )


def _dead(rows: Sequence[LayerCriticality]) -> list[str]:
    return [f"{row.name}: its features do not move (weakness 0)" for row in rows if row.weakness == 0]


def _describe(attack: Attack) -> str:
    threat = attack.threat
    steps = getattr(attack, "steps", None)
    return f"{type(attack).__name__}{'' if steps is None else f'-{steps}'} {threat.norm} eps {threat.eps:.4g}"
