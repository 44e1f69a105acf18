"""What a model itself shows when its robustness may be an artefact: masked gradients and their kin.

The checks are those of Athalye et al. 2018, of Carlini et al. 2019 and of AutoAttack's own code, on a few images.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toughen.attacks import PGD, CrossEntropy, Goal, Margin
from toughen.attacks.probabilities import at_least_float32
from toughen.attacks.threat import BALLS
from toughen.errors import InputError
from toughen.evaluation.outcomes import Flag
from toughen.evaluation.sanity import ONE_STEP, beyond_chance
from toughen.layers import ModelView
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.rng import generator, stream_seed
from toughen.types import Batches, ThreatModel, check_images

PASSES = 5  # over the same images, as AutoAttack makes
SAME = 1e-4  # by how much logits of length 1 may differ between them, as AutoAttack allows
ALONE_IMAGES = 8
ALONE = 1e-2  # the same, between batches of different sizes: kernels differ, TF32 ones by 1e-3
PROBABILITY = 1e-5  # how near to 1 the sum of probabilities is, as AutoAttack takes it
ZERO_SHARE = 0.05  # of the images may have a gradient that underflows: the best fitted ones of an honest network do
UNBOUNDED_IMAGES = 16
# steps, the part of eps that each takes, and momentum; the second where images stand after the first
UNBOUNDED_SEARCHES = ((20, 1 / 5, 0.0), (100, 1 / 10, 1.0))
MISLED, MISLED_SHARE = 4, 0.1  # images where a random step does better: up to half, but 1 % in honest networks
STEPS = 10  # of the attack that one step must not beat, each eps / 4


def check_model(
    model: nn.Module, batches: Batches, *, threat: ThreatModel, seed: int = 0, samples: int = 64
) -> tuple[Flag, ...]:
    """Look for what makes attacks fail without making a model robust.

    In eval mode, on the first ``samples`` images: modules that stay in train mode, a forward that differentiates, that
    is random, or that depends on the other images of the batch, and logits that are not finite or are probabilities
    (log-probabilities do no harm: cross-entropy and differences of logits stay the same).

    On those that the model gets right: gradients of the cross-entropy that are absent, not finite or zero, images that
    stand although an attack may change them at will, a gradient that leads no closer to an error than a random
    direction, and one step of eps that fells more images than many shorter ones.

    For 64 images of an honest model that is about 1,800 forwards and 1,100 backwards, as much as PGD-20 on 60 images.

    Args:
        model: Maps [B, ...] images to [B, K] logits; left as found.
        batches: (x, y) pairs (or ``Batch``); none larger than the first is shown to the model at once.
        threat: What the attacks of the evaluation may do.
        seed: Of the random starts.
        samples: Images looked at, at least 1.

    Returns:
        One flag for each check that saw something; none for an honest model.

    Raises:
        InputError: No batches, ``samples`` below 1, or images that are not finite or not in ``threat.bounds``.
    """
    x, y, size = _first(batches, samples)
    check_images(x, threat.bounds)
    device = next((value.device for value in chain(model.parameters(), model.buffers())), x.device)
    x, y = x.to(device), y.to(device)
    with ExitStack() as stack:
        stack.enter_context(without_weight_gradients(model))
        stack.enter_context(mode(model, training=False))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(random_state_kept(model))
        torch.manual_seed(stream_seed(seed, "sanity"))  # what a noisy model draws decides what is seen
        subject = _Subject(model, size)
        flags = [*_modes(model), *_differentiates(model, torch.cat([x[:1], x[:1]]))]
        random = [*_random(subject, x)]
        # noise differs between batches, too
        flags += random or _depends_on_batch(model, x[: max(1, min(size // 2, ALONE_IMAGES))], threat)
        logits = subject(x)
        flags += [*_not_finite(logits), *_probabilities(logits)]
        right = _right(logits, y)
        if bool(right.any()):
            flags += _attacked(subject, x[right], y[right], threat, seed)
    return tuple(flags)


class _Subject:
    """A model that is shown at most ``size`` images at once."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(part) for part in torch.split(x, self.size)])

    @torch.no_grad()
    def margin(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([Margin().bind(ModelView(self.model), *part)(part[0]) for part in self._parts(x, y)])

    def stands(self, x: Tensor, y: Tensor) -> Tensor:
        return _right(self(x), y)

    def attacked(self, attack: PGD, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        return torch.cat([attack(self.model, *part, **options) for part in self._parts(x, y)])

    def gradient(self, goal: Goal, x: Tensor, y: Tensor) -> Tensor | None:
        """Of a goal with respect to the images; None where autograd finds no way to them."""
        found = []
        for part in self._parts(x, y):
            image = part[0].detach().clone().requires_grad_(True)
            with torch.enable_grad():
                value = goal.bind(ModelView(self.model), *part)(image).sum()
            gradient = torch.autograd.grad(value, image, allow_unused=True)[0] if value.requires_grad else None
            if gradient is None:
                return None
            found.append(gradient)
        return torch.cat(found)

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(torch.split(x, self.size), torch.split(y, self.size), strict=True)


def _right(logits: Tensor, y: Tensor) -> Tensor:
    # argmax would pick a class among NaNs too
    right: Tensor = (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)
    return right


def _first(batches: Batches, samples: int) -> tuple[Tensor, Tensor, int]:
    if samples < 1:
        raise InputError(f"samples is {samples}; the checks need at least 1 image")
    images, labels, left = [], [], samples
    for x, y, *_ in batches:
        images.append(x[:left])
        labels.append(y[:left])
        left -= len(images[-1])
        if left == 0:
            break
    if left == samples:
        raise InputError("no images to check the model on: the batches are empty")
    return torch.cat(images), torch.cat(labels), max(map(len, images))


def _modes(model: nn.Module) -> Iterator[Flag]:
    names = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if names:
        yield Flag(
            "train-mode",
            f"{len(names)} of {sum(1 for _ in model.modules())} modules in train mode after eval(): "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            "let train(False) reach them: batch norm and dropout act otherwise there",
        )


class _Watch(TorchFunctionMode):
    """Counts calls of autograd."""

    DIFFERENTIATES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls += func in self.DIFFERENTIATES
        return func(*args, **(kwargs or {}))


def _differentiates(model: nn.Module, x: Tensor) -> Iterator[Flag]:
    with _Watch() as watch, torch.no_grad():
        model(x)
    if watch.calls:
        yield Flag(
            "autograd-in-forward",
            f"one forward calls autograd {watch.calls} times",
            "a defence that optimises at test time needs an attack made for it",
        )


def _random(subject: _Subject, x: Tensor) -> Iterator[Flag]:
    passes = [subject(x) for _ in range(PASSES)]
    apart = _apart(passes)
    if apart > SAME:
        classes = torch.stack([logits.argmax(dim=1) for logits in passes])
        changes = int((classes != classes[0]).any(dim=0).sum())
        yield Flag(
            "randomised-forward",
            f"{PASSES} passes over the same {len(x)} images differ by up to {apart:.2g} of the logits' length "
            f"(allowed {SAME:g}) and in the class of {changes}",
            "attack the expectation over the model's randomness, and expect other numbers in another run",
        )


def _depends_on_batch(model: nn.Module, x: Tensor, threat: ThreatModel) -> Iterator[Flag]:
    others = sum(threat.bounds) - x  # there are others even where only one image is
    with torch.no_grad():
        together = model(torch.cat([x, others]))[: len(x)]
        # two copies rather than one image: batch norm refuses one value per channel
        alone = torch.cat([model(torch.cat([image, image]))[:1] for image in torch.split(x, 1)])
    allowed = max(ALONE, 8 * torch.finfo(together.dtype).eps)
    apart = _apart([together, alone])
    if apart > allowed:
        yield Flag(
            "batch-dependent",
            f"the logits of an image differ by up to {apart:.2g} of their length (allowed {allowed:.2g}) between a "
            f"batch of {2 * len(x)} and alone",
            "let batch norm use its running statistics, so that an image is judged by itself",
        )


def _apart(outputs: list[Tensor]) -> float:
    """The largest distance between outputs [B, K] of the same image, each scaled to length 1."""
    values = at_least_float32(torch.stack(outputs, dim=1))
    units = nn.functional.normalize(values, dim=2).nan_to_num()
    return float(torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist").amax())


def _not_finite(logits: Tensor) -> Iterator[Flag]:
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        yield Flag(
            "non-finite-logits",
            f"{bad} of {len(logits)} clean images have NaN or infinite logits",
            "look for an overflow, a division by zero or the logarithm of zero inside the model",
        )


def _probabilities(logits: Tensor) -> Iterator[Flag]:
    values = at_least_float32(logits)
    allowed = max(PROBABILITY, 4 * torch.finfo(logits.dtype).eps)
    if bool((values >= 0).all() and ((values.sum(dim=1) - 1).abs() <= allowed).all()):
        yield Flag(
            "probabilities",
            f"the outputs of all {len(logits)} images are at least 0 and sum to 1",
            "return logits: a second softmax flattens the loss that attacks climb",
        )


def _attacked(subject: _Subject, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Iterator[Flag]:
    """The checks on images that the model gets right."""
    gradient = subject.gradient(CrossEntropy(), x, y)
    if gradient is None:
        yield Flag(
            "no-gradient",
            "autograd finds no way from the cross-entropy to the image",
            "remove detach, no_grad or numpy from the forward, or attack without gradients",
        )
        return
    yield from _gradients(gradient.flatten(1))
    if bool((y != y[0]).any()):  # else the model may know one class only, which no attack can change
        yield from _unbounded(subject, x, y, threat)
    if threat.eps > 0:
        draw = generator(seed, "sanity", device=x.device)
        yield from _uphill(subject, x, y, threat, draw)
        yield from _one_step(subject, x, y, threat, draw)


def _gradients(gradient: Tensor) -> Iterator[Flag]:
    finite = gradient.isfinite().all(dim=1)
    zero = int((gradient == 0).all(dim=1).sum())
    if not bool(finite.all()):
        yield Flag(
            "non-finite-gradients",
            f"{int((~finite).sum())} of {len(gradient)} correctly classified images have a NaN or infinite gradient",
            "look for a square root, a logarithm or a division at zero inside the model",
        )
    if zero > ZERO_SHARE * len(gradient):
        yield Flag(
            "zero-gradients",
            f"the gradient of the cross-entropy is exactly zero for {zero} of {len(gradient)} correctly classified "
            f"images ({zero / len(gradient):.0%}, allowed {ZERO_SHARE:.0%})",
            "attack the difference of logits or without gradients: rounding or saturated logits stop the others",
        )


def _unbounded(subject: _Subject, x: Tensor, y: Tensor, threat: ThreatModel) -> Iterator[Flag]:
    """Allow every image of the box, beginning at the image itself, since a random one would fell by chance."""
    extent = threat.bounds[1] - threat.bounds[0]
    eps = extent if threat.norm == "linf" else extent * math.sqrt(x[0].numel())
    x_left, y_left = x[:UNBOUNDED_IMAGES], y[:UNBOUNDED_IMAGES]
    for steps, part, momentum in UNBOUNDED_SEARCHES:
        attack = PGD(
            replace(threat, eps=eps),
            step_size=eps * part,
            steps=steps,
            momentum=momentum,
            random_start=False,
            keep="worst",
        )
        stands = subject.stands(subject.attacked(attack, x_left, y_left, goal=Margin()), y_left)
        x_left, y_left = x_left[stands], y_left[stands]
        if not len(x_left):
            return
    yield Flag(
        "unbounded-eps",
        f"{len(x_left)} of {min(len(x), UNBOUNDED_IMAGES)} images stand although the attack may change every pixel to "
        "any value, and other images have other classes",
        "the attack fails here for want of a useful gradient, so it says nothing at a small eps either",
    )


def _uphill(subject: _Subject, x: Tensor, y: Tensor, threat: ThreatModel, draw: torch.Generator) -> Iterator[Flag]:
    """From a random point, compare a short step along the gradient with one in a random direction."""
    ball, length = BALLS[threat.norm], threat.eps / 4
    radius = torch.full((len(x), *[1] * (x.dim() - 1)), threat.eps).to(x)
    # at the clean image itself, pixels of a few levels (0, 1/255, ...) can hide that the gradient jumps in between
    x = (x + ball.sample(x, radius, draw)).clamp(*threat.bounds)
    gradient = subject.gradient(Margin(), x, y)
    assert gradient is not None  # there is one at the clean images
    moves = (gradient.isfinite() & (gradient != 0)).flatten(1).any(dim=1)

    def margin(direction: Tensor) -> Tensor:
        x_adv = (x + length * ball.ascend(direction)).clamp(*threat.bounds)
        return subject.margin(x_adv, y)

    gained = (margin(gradient) - margin(torch.empty_like(x).normal_(generator=draw)))[moves]
    misled, led = int((gained < 0).sum()), int((gained > 0).sum())
    if misled >= MISLED and misled > MISLED_SHARE * (misled + led):
        yield Flag(
            "gradient-misleads",
            f"for {misled} of {misled + led} images, a step of {length:.2g} along the gradient brings the model less "
            "close to an error than one in a random direction",
            "the gradient is not the slope at the scale of eps: attack without it, or through a smooth stand-in",
        )


def _one_step(subject: _Subject, x: Tensor, y: Tensor, threat: ThreatModel, draw: torch.Generator) -> Iterator[Flag]:
    one = PGD(threat, step_size=threat.eps, steps=1, random_start=False)
    many = PGD(threat, step_size=threat.eps / 4, steps=STEPS)
    stands_one = subject.stands(subject.attacked(one, x, y), y)
    stands_many = subject.stands(subject.attacked(many, x, y, generator=draw), y)
    if beyond_chance(stands_one.tolist(), stands_many.tolist()):
        yield Flag(
            ONE_STEP,
            f"of {len(x)} images, {int(stands_one.sum())} stand under one step of eps = {threat.eps:g}, "
            f"{int(stands_many.sum())} under {STEPS} steps of a quarter of it",
            "the gradient does not lead uphill: use an attack without gradients, or through a smooth stand-in",
        )
