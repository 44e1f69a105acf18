"""The training loop: one run from its first epoch, or from a checkpoint, to its evaluation and its branches."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from toughen import data as datasets
from toughen import models
from toughen.criticality.selection import Selection
from toughen.data import DataSplits, Images, TrainLoader
from toughen.engine import checkpoint
from toughen.engine.device import pick_device, pick_precision
from toughen.engine.flops import flops_per_image
from toughen.engine.optim import make_optimizer
from toughen.engine.progress import EpochProgress, epoch_line, epoch_progress, epoch_status, sample_progress
from toughen.engine.provenance import provenance
from toughen.engine.recipe import ModelSettings, Recipe
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, evaluate, parse_attack, store
from toughen.layers.taps import random_state_kept
from toughen.objectives import PGDAT
from toughen.rng import stream_seed
from toughen.run_folder import RunFolder
from toughen.types import Batch


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written its checkpoint."""


@dataclass
class _Progress:
    """Where a run is, and what the epoch under way has added up: all that a resume needs beside the live objects."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best: float = -1.0
    best_epoch: int = 0
    flops: float = 0.0
    pgd_at_flops: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a recipe, writes its run folder, and goes on from wherever an earlier attempt stopped.

    Args:
        recipe: The whole run.
        out: The run folder, new or to be continued; None is ``runs/MODEL-DATA``, with a number where that is taken.
        model: Your own network instead of ``recipe.model``: images in [0, 1] go in, logits come out.
        data: Your own images instead of ``recipe.data``.
        start: A finished run whose last checkpoint this one continues (how branches begin).
        show_progress: Whether to draw a bar in a terminal.

    Raises:
        InputError: The folder holds a run, the data can't be read, a setting does not fit the model or the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        out: Path | str | None = None,
        model: nn.Module | None = None,
        data: DataSplits | None = None,
        start: RunFolder | None = None,
        resume: bool = False,
        show_progress: bool = True,
    ) -> None:
        self.recipe = recipe
        self.settings = recipe.train
        self.fabric = Fabric(
            accelerator=pick_device(self.settings.device),
            devices=1,
            precision=pick_precision(self.settings),
        )
        self.device = self.fabric.device
        self.data = datasets.load(recipe.data, device=self.device) if data is None else data
        if model is None:
            # a checkpoint brings its own weights, and those that a run began with may be gone by then
            model = create_model(recipe.model, self.data, seed=recipe.train.seed, start_weights=not resume)
        else:
            models.check_fit(model, image_shape=self.data.train.shape, num_classes=len(self.data.train.classes))
        self.model = model.to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.loader = training_loader(recipe, self.data, self.device)
        self.live = recipe.method.bind(self.model, attack=recipe.attack, seed=self.settings.seed)
        check_methods(recipe, self.model, self.data)
        self.optimizer = make_optimizer(self.model, self.settings)
        self.show_progress = show_progress
        self.progress = _Progress()
        self._stop_asked = False
        if resume:
            self.folder = RunFolder.open(Path(out or ""))
            self._check_images()
        else:
            folder = Path(out) if out else RunFolder.free(f"{recipe.model.name}-{recipe.data.name}")
            facts = provenance(seed=self.settings.seed, device=self.device, precision=pick_precision(self.settings))
            self.folder = RunFolder.create(folder, recipe.document(), {**facts, "images": self.data.identity()})
        if checkpoint.exists(self.folder.checkpoints / "last"):
            self._resume()
        elif start is not None:
            self._continue_from(start)
        elif resume and (run := self.folder.parent_run) is not None:
            raise InputError(f"branch {self.folder.path} has no checkpoint yet; resume its run: --resume {run.path}")

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> RunFolder:
        """Train to the end, evaluate the last and the best checkpoint on test images, then run the branches.

        Returns:
            The run folder.

        Raises:
            Interrupted: The process was asked to stop; the checkpoint is written.
            InputError: The loss became infinite; the checkpoint of the epoch before is kept.
        """
        if self.folder.finished:
            return self.folder
        total = self.recipe.stop_epoch * self.loader.steps_per_epoch
        with (
            self._stopping_politely(),
            random_state_kept(self.model),
            epoch_progress(self._title(), total=total, show=self.show_progress) as progress,
        ):
            while self.progress.epoch < self.recipe.stop_epoch and not self._patience_over():
                self._epoch(progress)
        self.live.release()
        self._evaluate()
        for name, recipe in self.recipe.branches.items():
            folder = self.folder.branch(name)
            Trainer(
                recipe,
                out=folder.path,
                model=deepcopy(self.model),
                data=self.data,
                start=self.folder,
                resume=folder.config_file.is_file(),
                show_progress=self.show_progress,
            ).fit()
        self.folder.write_finished({"epochs": self.progress.epoch, "method": self.recipe.method.label})
        return self.folder

    def _epoch(self, progress: EpochProgress) -> None:
        now = self.progress
        started = time.perf_counter() - now.seconds
        if now.step == 0:
            self._epoch_start()
        self.model.train()
        for batch in self.loader.epoch(now.epoch, start_step=now.step):
            self._step(batch)
            now.skipped += self.settings.batch_size - len(batch.y)
            now.step += 1
            progress.at(now.epoch * self.loader.steps_per_epoch + now.step)
            stop = self._stop_asked  # once per step: a wish that comes later waits for the next
            if stop or self._checkpoint_due():
                self._means()  # weights that a loss without a number has spoiled are not saved
                now.seconds = time.perf_counter() - started
                self._save("last")
            if stop:
                raise Interrupted
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now.seconds = time.perf_counter() - started
        self._epoch_end(progress)

    def _epoch_start(self) -> None:
        now, epoch = self.progress, self.progress.epoch
        size = min(len(self.data.train), max(4, self.live.probe_size))
        probe = datasets.probe(
            self.data.train, count=size, seed=self.settings.seed, position=epoch, device=self.device, batch_size=size
        )
        few = (probe[0].x[:4], probe[0].y[:4])
        if not now.pgd_at_flops:
            now.pgd_at_flops = flops_per_image(PGDAT().bind(self.model, attack=self.recipe.attack), *few)
        selection = self.live.epoch_start(epoch, [(b.x, b.y) for b in probe], optimizer=self.optimizer)
        now.sums = {}
        if selection is not None:
            self._write_selection(selection)
        if selection is not None or not now.flops:
            now.flops = flops_per_image(self.live, *few)

    def _write_selection(self, selection: Selection) -> None:
        report = {"epoch": selection.epoch, "selected": selection.layers, **selection.report.to_dict()}
        self.folder.write_report(selection.epoch, report)

    def _step(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        x = batch.x.contiguous(memory_format=torch.channels_last)
        # what dropout and its like draw depends on the step alone, as all other randomness does
        torch.manual_seed(stream_seed(self.settings.seed, "forward", self.progress.epoch, self.progress.step))
        with self.fabric.autocast():
            output = self.live(x, batch.y, batch.index)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(output.loss)
        self.optimizer.step()
        sums = self.progress.sums
        for name, value in {"loss": output.loss.detach(), **output.terms}.items():
            sums[name] = sums[name] + value if name in sums else value.double()

    def _lr(self) -> float:
        """The rate of the coming step: the schedule, counted from where the method wants it, times its factor."""
        now, start = self.progress, self.live.schedule_start
        done = now.epoch - start + now.step / self.loader.steps_per_epoch
        return self.settings.lr_at(done / (self.settings.epochs - start)) * self.live.lr_scale

    def _epoch_end(self, progress: EpochProgress) -> None:
        now = self.progress
        means = self._means()
        lr = self.optimizer.param_groups[0]["lr"]
        now.epoch, now.step = now.epoch + 1, 0
        row: dict[str, Any] = {
            "epoch": now.epoch,
            "method": self.recipe.method.label,
            "losses": means,
            "lr": lr,
            "seconds": now.seconds,
            "images_per_second": self.loader.images_per_epoch / now.seconds,
            **({"skipped_images": now.skipped} if now.skipped else {}),
            "trainable_share": self._trainable_share(),
            "selected": self.live.selected,
            "gflops_per_image": now.flops / 1e9,
            "pgd_at_gflops_per_image": now.pgd_at_flops / 1e9,
            **self.live.facts(),
        }
        if now.epoch % self.settings.validate_every == 0 or now.epoch == self.recipe.stop_epoch:
            row["validation"] = self._validate()
        now.log.append(row)
        now.seconds, now.skipped = 0.0, 0
        better = "validation" in row and row["validation"]["robust"] > now.best
        if better:
            now.best, now.best_epoch = row["validation"]["robust"], now.epoch
        # in this order, a kill between two of them is made good when the epoch is repeated
        if better:
            self._save("best")
        self.folder.write_log(now.log)
        self._save("last")
        progress.say(epoch_line(self.folder.path.name, row), status=epoch_status(now.log))
        if self._stop_asked:
            raise Interrupted

    def _title(self) -> str:
        return f"{self.folder.path.name}: {self.recipe.method.label}"

    def _means(self) -> dict[str, float]:
        """The mean of each loss term over the steps of this epoch so far; refuses to go on if one is not finite."""
        now = self.progress
        means = {name: float(total) / now.step for name, total in now.sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            terms = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
            raise InputError(
                f"the loss is not finite in epoch {now.epoch + 1} ({terms}); lower train.lr. "
                f"The checkpoint from before is kept in {self.folder.checkpoints}"
            )
        return means

    def _trainable_share(self) -> float:
        trainable: int = sum(parameter.numel() for parameter in self.live.trainable())
        return trainable / sum(parameter.numel() for parameter in self.model.parameters())

    # -- measuring --------------------------------------------------------------------------------

    def _validate(self) -> dict[str, Any]:
        """Clean and robust accuracy on the held-out part of the training data, with the attack of the run."""
        attacks = [EvalAttack("clean", None), EvalAttack("robust", self.recipe.attack)]
        results = evaluate(self.model, self._batches(self.data.validation), attacks, seed=self.settings.seed)
        return {**{name: result.accuracy for name, result in results.items()}, "n": results["clean"].n}

    def _evaluate(self) -> None:
        """Measure the last and the best checkpoint on test images; what is on disk already is kept."""
        wanted, recipe = self.recipe.evaluate, self.recipe
        attacks = [parse_attack(n, threat=recipe.threat, step_size=recipe.test_step_size) for n in wanted.attacks]
        images = self.data.test.subset(slice(wanted.samples))
        for name in ("best", "last"):
            state = checkpoint.load(self.folder.checkpoints / name, self.model)
            stored = self.folder.evaluations(name)
            if all(attack.name in stored and stored[attack.name]["epoch"] == state["epoch"] for attack in attacks):
                continue
            with sample_progress(len(images)) as progress:
                results = evaluate(
                    self.model, self._batches(images), attacks, seed=self.settings.seed, progress=progress
                )
            store(self.folder, results, checkpoint=name, epoch=state["epoch"], images=images)

    def _batches(self, images: Images) -> Iterator[Batch]:
        return datasets.in_order(images, batch_size=self.recipe.test_batch_size, device=self.device)

    # -- stopping and resuming --------------------------------------------------------------------

    def _patience_over(self) -> bool:
        patience, now = self.settings.patience, self.progress
        measured = bool(now.log) and "validation" in now.log[-1]
        return patience is not None and measured and now.epoch - now.best_epoch >= patience

    def _checkpoint_due(self) -> bool:
        every = self.settings.checkpoint_steps
        return every is not None and self.progress.step % every == 0

    def _save(self, name: str) -> None:
        now = self.progress
        state = {**vars(now), "live": self.live.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.folder.checkpoints / name, self.model, state)

    def _check_images(self) -> None:
        began = self.folder.provenance().get("images")
        if began is not None and began != self.data.identity():
            raise InputError(
                f"run {self.folder.path} began on other images ({began['name']}, {began['counts'][0]} for training)"
                f" than these ({self.data.name}, {len(self.data.train)}); if they were your own, go on in Python:"
                " Trainer(recipe, data=..., resume=True)"
            )

    def _resume(self) -> None:
        """Take up this run where its last checkpoint left it, in the middle of an epoch or between two."""
        state = checkpoint.load(self.folder.checkpoints / "last", self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.live.load_state_dict(state["live"])
        now = _Progress(**{name: state[name] for name in vars(_Progress())})
        now.sums = {name: value.to(self.device) for name, value in now.sums.items()}
        self.progress = now

    def _continue_from(self, start: RunFolder) -> None:
        """Begin as a branch: weights, momentum, epoch, random streams of a run; its state if the method is the same."""
        state = checkpoint.load(start.checkpoints / "last", self.model)
        own = self.optimizer.state_dict()["param_groups"]  # a branch may have its own weight decay, for example
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        if start.config()["method"] == self.recipe.document()["method"]:
            self.live.load_state_dict(state["live"])
        self.live.calls = state["live"]["calls"]
        self.progress = _Progress(epoch=state["epoch"], best_epoch=state["epoch"])

    @contextmanager
    def _stopping_politely(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into a wish that the loop fulfils after the step under way."""

        def ask(_signal: int, _frame: FrameType | None) -> None:
            self._stop_asked = True

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the signals belong to somebody else
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_methods(recipe: Recipe, model: nn.Module, data: DataSplits) -> None:
    """Refuse what this model can't do before hours are spent, in the branches too.

    Raises:
        InputError: Names the setting, for example a ``k`` above the number of layers.
    """
    device = next(model.parameters()).device
    x = next(datasets.in_order(data.train, batch_size=1, device=device)).x
    for member in (recipe, *recipe.branches.values()):
        member.method.bind(model, attack=member.attack, seed=member.train.seed).check(x)


def create_model(settings: ModelSettings, data: DataSplits, *, seed: int = 0, start_weights: bool = True) -> nn.Module:
    """Build the network for a data set: its classes, its channels, its statistics inside.

    Args:
        settings: Which network.
        data: What it is for.
        seed: Of the initial weights.
        start_weights: Whether to load the weights that the settings name; not when a checkpoint follows.

    Raises:
        InputError: The network cannot be built, its weights do not fit, or it does not take these images.
    """
    _, height, width = data.train.shape
    model = models.create(
        settings.name,
        num_classes=len(data.train.classes),
        width=settings.width,
        in_channels=data.train.shape[0],
        image_size=height if height == width else None,
        mean=settings.mean,
        std=settings.std,
        data_statistics=(data.mean, data.std),
        seed=seed,
        pretrained=(settings.pretrained or None) if start_weights else False,
        weights=settings.weights if start_weights else None,
        classifier=settings.classifier if start_weights else "loaded",
    )
    models.check_fit(model, image_shape=data.train.shape, num_classes=len(data.train.classes))
    return model


def training_loader(recipe: Recipe, data: DataSplits, device: torch.device | str) -> TrainLoader:
    """Return the training batches of a recipe.

    Raises:
        InputError: The batch size does not fit the data, or the recipe names extra images that the data has not.
    """
    if recipe.data.extra is not None and data.extra is None:
        raise InputError(
            f"data.extra is {recipe.data.extra.path}, and these images of your own come without; give them as"
            " DataSplits(..., extra=...)"
        )
    return datasets.train_loader(
        data,
        batch_size=recipe.train.batch_size,
        device=device,
        seed=recipe.train.seed,
        augment=recipe.data.augmentations,
        extra_fraction=recipe.data.extra.fraction if recipe.data.extra else 0.0,
        workers=recipe.data.num_workers,
    )
