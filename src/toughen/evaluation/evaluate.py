"""Accuracy under attacks, per sample: a sample stands only if it is right when clean and under every stage."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen import processes
from toughen.attacks.probabilities import at_least_float32
from toughen.errors import InputError, first_line
from toughen.evaluation.counting import counted
from toughen.evaluation.journal import Journal
from toughen.evaluation.masking import check_model
from toughen.evaluation.outcomes import EvalResult, Stage
from toughen.evaluation.samples import CLEAN, STANDS, Found, Samples, chunked, rounded
from toughen.evaluation.sanity import check_results
from toughen.evaluation.suites import EvalAttack, Search, check_attack
from toughen.layers.taps import buffers_kept, mode, random_state_kept, without_weight_gradients
from toughen.rng import generator
from toughen.types import Batch, Batches, ThreatModel, check_images

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attacked:
    """A chunk of attacked samples, as ``evaluate`` hands it on.

    Attributes:
        where: [B], int64, positions of the samples in the evaluation, from 0.
        x_adv: [B, C, H, W], what the attack returned.
        y: [B], int64, labels.
        inside: [B], bool, whether they are within the threat model.
        broke: [B], bool, whether they are, and the model gets them wrong.
    """

    where: Tensor
    x_adv: Tensor
    y: Tensor
    inside: Tensor
    broke: Tensor


def evaluate(
    model: nn.Module,
    batches: Batches,
    attacks: Sequence[EvalAttack],
    *,
    seed: int = 0,
    batch_size: int | None = None,
    attack_all: bool = False,
    sanity: bool = True,
    journal: Journal | None = None,
    on_attacked: Callable[[Attacked], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, EvalResult]:
    """Evaluate a model in eval mode and in full precision; each stage runs on the samples that still stand.

    The samples that stand are attacked in full batches, in their order. Where ``torch.distributed`` is initialised,
    each process takes every so-many-th batch and all return the same results, equal to those of one process.

    Args:
        model: Maps [B, ...] images in [0, 1] to logits; left as found.
        batches: (x, y) pairs (or ``Batch``), in memory or iterable anew for each stage; moved to the model's device.
            What can be iterated only once is kept in memory.
        attacks: See ``parse_attack``.
        seed: Of all randomness; together with the attack's name and the number of the batch it decides the draws.
        batch_size: Samples attacked at once; None takes the size of the first batch.
        attack_all: Attack also the samples that the model gets wrong when clean, in the first stage: they count as
            fallen in any case, but ``on_attacked`` sees their images.
        sanity: Look for signs that robustness is an artefact; what is found stands in ``flags`` of the results.
        journal: Where outcomes are kept as they come, and taken up again.
        on_attacked: Called with each chunk of perturbed images, for example to show them to other models.
        progress: Called with the attack (and stage), the samples done and the samples to do.

    Returns:
        One result per attack, by name.

    Raises:
        InputError: No batches, images that are not finite, not in [0, 1] or in half precision, a model that fails on
            them, labels that are none of its classes, batches that come in another order when they are iterated again,
            what is no ``EvalAttack``, an attack that is named twice or leaves the image box, or a damaged journal.
    """
    for attack in attacks:
        check_attack(attack)
    names = [attack.name for attack in attacks]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"attack {repeated[0]!r} is named twice; name each once")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    again = list(batches) if isinstance(batches, Iterator) else batches
    run = _Evaluation(model, again, seed, batch_size, attack_all, journal, on_attacked, progress or _silent)
    results: dict[str, EvalResult] = {}
    with as_evaluated(model):
        run.look()
        for attack in attacks:
            results[attack.name] = run.measure(attack)
        threats = [stage.threat for attack in attacks for _, stage in attack.stages if hasattr(stage, "threat")]
        if not (sanity and threats):
            return results
        flags = (*check_model(model, again, threat=threats[0], seed=seed), *check_results(results))
    for name, result in results.items():
        results[name] = replace(result, flags=flags)
        if journal is not None and results[name] != result:
            processes.by_first(partial(journal.write, results[name]))
    return results


class _Evaluation:
    """One call of ``evaluate``: the clean samples, and how an attack is measured on them."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        seed: int,
        batch_size: int | None,
        attack_all: bool,
        journal: Journal | None,
        on_attacked: Callable[[Attacked], None] | None,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.seed, self.attack_all = model, batches, seed, attack_all
        self.journal, self.on_attacked, self.progress = journal, on_attacked, progress
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.batch_size = batch_size or 0
        self.clean: Samples
        self.num_classes = 0
        self.image_shape: tuple[int, ...] = ()

    def look(self) -> None:
        """Show the model every clean image once."""
        parts = []
        seen = 0
        for batch in self.batches:
            x, y = batch[0].to(self.device), batch[1].to(self.device)
            _check_precise(x)
            check_images(x, (0.0, 1.0))
            self.batch_size = self.batch_size or len(x)
            right, loss, self.num_classes = shown(self.model, x, y)
            self.image_shape = tuple(x.shape[1:])
            counted_on = isinstance(batch, Batch) and batch.index is not None
            index = batch.index.cpu() if counted_on else torch.arange(seen, seen + len(x))
            parts.append((index, y.cpu(), right.cpu(), rounded(loss)))
            seen += len(x)
        if not seen:
            raise InputError("no images to evaluate: the batches are empty")
        index, label, right, loss = (torch.cat(column) for column in zip(*parts, strict=True))
        fell = torch.where(right, STANDS, CLEAN)
        self.clean = Samples(index, label, loss, torch.zeros_like(loss), fell)

    def measure(self, attack: EvalAttack) -> EvalResult:
        """Run the stages of an attack, or what the journal lacks of them."""
        samples = self.clean.copy()
        stages = [Stage(name) for name, _ in attack.stages]
        empty = self._result(attack, samples, [], complete=False)
        known = self.journal.find(empty) if self.journal is not None else None
        if known is not None:
            if known.complete:
                return known
            samples = Samples.of(known)
            stages[: len(known.stages)] = known.stages
        first = max(len(known.stages) - 1, 0) if known is not None else 0
        for number in range(first, len(stages)):
            self._run_stage(attack, number, samples, stages)
        result = self._result(attack, samples, stages, complete=True)
        if self.journal is not None:
            processes.by_first(partial(self.journal.write, result))
        return result

    def _run_stage(self, attack: EvalAttack, number: int, samples: Samples, stages: list[Stage]) -> None:
        name, search = attack.stages[number]
        chosen = (samples.fell == STANDS) | (samples.fell > number)
        if self.attack_all and number == 0:
            chosen[:] = True
        places = chosen.nonzero().flatten()
        done = stages[number].attacked
        title = attack.name if len(attack.stages) == 1 else f"{attack.name} {name}"
        ranks, rank = processes.count(), processes.rank()
        chunks = chunked(self.batches, places[done:], self.batch_size, label=self.clean.label)
        try:
            while turn := list(islice(chunks, ranks)):
                first = done // self.batch_size
                self.progress(title, done, len(places))
                place = (number, first + rank)
                mine = partial(self._attack, search, attack, *place, *turn[rank]) if rank < len(turn) else None
                for found, cost in processes.shared(mine):
                    samples.take(found, number)
                    stages[number] = _added(stages[number], cost)
                done = stages[number].attacked
                processes.by_first(partial(self._keep, attack, samples, stages[: number + 1]))
        except BaseException:
            if self.journal is not None and rank == 0 and (done or number):
                self.journal.write(self._result(attack, samples, stages[: number + 1], complete=False))
            raise
        self.progress(title, len(places), len(places))

    def _keep(self, attack: EvalAttack, samples: Samples, stages: Sequence[Stage]) -> None:
        """Write down what is known so far, once in a while."""
        if self.journal is not None and self.journal.due():
            self.journal.write(self._result(attack, samples, stages, complete=False))

    def _attack(
        self, search: Search, attack: EvalAttack, number: int, chunk: int, where: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Found, Stage]:
        name, _ = attack.stages[number]
        x, y = x.to(self.device), y.to(self.device)
        if getattr(search, "reseeds", False):
            draw = torch.Generator(device=self.device)
            draw.manual_seed(self.seed % 2**64)  # more than that has no room in a generator
        else:
            stream = attack.name if len(attack.stages) == 1 else f"{attack.name}/{name}"
            draw = generator(self.seed, stream, chunk, device=self.device)
        started = time.perf_counter()
        with counted(self.model) as count:
            x_adv = search(self.model, x, y, generator=draw).detach()
        lost = ~x_adv.isfinite().flatten(1).all(dim=1)  # a gradient that was not a number; the sanity checks tell
        x_adv = torch.where(lost.view(-1, *[1] * (x.dim() - 1)), x, x_adv)
        right, loss, _ = shown(self.model, x_adv, y)
        distance, inside = _distance(search, name, x, x_adv)
        broke = ~right & inside
        seconds = time.perf_counter() - started
        if self.on_attacked is not None:
            self.on_attacked(Attacked(where, x_adv, y, inside, broke))
        found = Found(where, broke.cpu(), rounded(loss), rounded(distance))
        standing = int((broke.cpu() & (self.clean.fell[where] == STANDS)).sum())
        return found, Stage(name, len(x), standing, count.forwards + len(x), count.backwards, seconds)

    def _result(self, attack: EvalAttack, samples: Samples, stages: Sequence[Stage], *, complete: bool) -> EvalResult:
        names = ["clean", *(name for name, _ in attack.stages)]
        remarks = (
            remark for _, search in attack.stages for remark in _remarks(search, self.num_classes, self.image_shape)
        )
        return EvalResult(
            attack=attack.name,
            settings=attack.settings(),
            seed=self.seed,
            batch_size=self.batch_size,
            attack_all=self.attack_all,
            index=tuple(samples.index.tolist()),
            label=tuple(samples.label.tolist()),
            correct=tuple((samples.fell == STANDS).tolist()),
            loss=tuple(samples.loss.tolist()),
            distance=tuple(samples.distance.tolist()),
            fell=tuple(None if code == STANDS else names[code] for code in samples.fell.tolist()),
            stages=tuple(stages),
            remarks=tuple(dict.fromkeys(remarks)),
            versions=_versions(attack),
            device=self.device.type,
            facts={} if self.journal is None else self.journal.facts,
            complete=complete,
        )


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision, no weight gradients."""
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(without_weight_gradients(model))
        stack.enter_context(buffers_kept(model))
        stack.enter_context(random_state_kept(model))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def shown(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which samples the model gets right, [B]; their cross-entropy, [B]; how many classes there are.

    Raises:
        InputError: The model fails on the images, or a label is none of its classes.
    """
    with torch.no_grad():
        logits = at_least_float32(_logits(model, x))
        if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
            raise InputError(
                f"labels range from {int(y.min())} to {int(y.max())}; "
                f"with {logits.shape[1]} classes they must be 0 to {logits.shape[1] - 1}"
            )
        loss = F.cross_entropy(logits, y, reduction="none").nan_to_num(nan=float("inf"))
    # argmax would pick a class among NaNs too
    right: Tensor = (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)
    return right, loss, logits.shape[1]


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        found: Tensor = model(x)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's own forward can raise anything
        raise InputError(
            f"the model {type(model).__name__} fails on images of shape {list(x.shape)}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return found


def _check_precise(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"images are {x.dtype}, too coarse to tell what is within eps; give torch.float32 in [0, 1]")


def _distance(search: Search, name: str, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """How far each sample was moved, [B], and whether that is within the threat model, [B].

    Raises:
        InputError: Pixels outside the image box.
    """
    if float(x_adv.min()) < -1e-6 or float(x_adv.max()) > 1 + 1e-6:
        raise InputError(f"attack {name!r} returned pixels that are not in [0, 1]; the attack is at fault")
    threat: ThreatModel | None = getattr(search, "threat", None)
    order = 2.0 if threat is not None and threat.norm == "l2" else float("inf")
    distance: Tensor = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)
    if threat is None:
        return distance, torch.ones_like(distance, dtype=torch.bool)
    inside = distance <= threat.eps * (1 + 1e-5) + 1e-6  # float32 rounds what lies on the surface
    return distance, inside


def _added(stage: Stage, more: Stage) -> Stage:
    counts = ("attacked", "fell", "forwards", "backwards", "seconds")
    return replace(stage, **{name: getattr(stage, name) + getattr(more, name) for name in counts})


def _remarks(search: Search, num_classes: int, image_shape: tuple[int, ...]) -> tuple[str, ...]:
    told: Callable[[int, tuple[int, ...]], tuple[str, ...]] | None = getattr(search, "remarks", None)
    return told(num_classes, image_shape) if told is not None else ()


def _versions(attack: EvalAttack) -> dict[str, str]:
    libraries = {name for _, search in attack.stages for name in getattr(search, "libraries", ())}
    return {name: version(name) for name in ["toughen", "torch", *sorted(libraries)]}


def _silent(title: str, done: int, total: int) -> None:
    pass
