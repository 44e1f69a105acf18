"""The training loop: one run from its first epoch, or from a checkpoint, to its evaluation and its branches."""

import time
import warnings
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toughen import data as datasets
from toughen import models, processes
from toughen.criticality.selection import Selection
from toughen.data import DataSplits
from toughen.engine import checkpoint, epoch_sums
from toughen.engine.accuracy import evaluate_checkpoints, in_order, validate
from toughen.engine.auto_rate import halvings
from toughen.engine.build import check_methods, create_model, training_loader
from toughen.engine.device import check_compiler, make_fabric
from toughen.engine.faults import LOOK_EVERY, FaultWatch, check_finite, collapse
from toughen.engine.flops import flops_per_image
from toughen.engine.open_run import check_alike, create_run, open_run
from toughen.engine.optim import make_optimizer
from toughen.engine.progress import EpochProgress, epoch_line, epoch_progress, epoch_status
from toughen.engine.recipe import Recipe
from toughen.engine.run_state import Progress, RunState
from toughen.engine.sharding import sharded
from toughen.engine.tracking import Tracker, check_tracker, tracked
from toughen.engine.update import Updater
from toughen.engine.wishes import Wishes
from toughen.errors import InputError, Notice
from toughen.layers import compile_forward, localise_norms, synchronise_norms
from toughen.layers.taps import random_state_kept
from toughen.objectives import PGDAT, Live
from toughen.run_folder import RunFolder
from toughen.types import Batch


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written its checkpoint."""


class Trainer:
    """Trains a recipe, writes its run folder, and goes on from wherever an earlier attempt stopped.

    Where ``torchrun`` started several processes, each makes a trainer of the same settings and trains on its share of
    every batch; the first one writes. The run folder must lie where all of them can read it.

    Args:
        recipe: The whole run.
        out: The run folder, new or to be continued; None is ``runs/MODEL-DATA``, with a number where that is taken.
        model: Your own network instead of ``recipe.model``: images in [0, 1] go in, logits come out.
        data: Your own images instead of ``recipe.data``.
        start: A finished run whose last checkpoint this one continues (how branches begin).
        resume: Whether to go on with the run in ``out``.
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
        self.fabric = make_fabric(self.settings)
        self.device = self.fabric.device
        self.data = datasets.load(recipe.data, device=self.device) if data is None else data
        if model is None:
            # a checkpoint brings its own weights, and those that a run began with may be gone by then
            model = create_model(recipe.model, self.data, seed=recipe.train.seed, start_weights=not resume)
        else:
            models.check_fit(model, image_shape=self.data.train.shape, num_classes=len(self.data.train.classes))
        self.model = model.to(self.device)
        self.model.to(memory_format=torch.channels_last)
        check_alike(recipe, self.data)
        processes.spread(self.model.state_dict().values())  # a network of the user's own may be drawn without a seed
        if processes.count() > 1:  # both, since a branch gets the network of its run
            (synchronise_norms if self.settings.batch_norm == "sync" else localise_norms)(self.model)
        check_tracker(self.settings.logger)
        if self.settings.compile:
            check_compiler(self.settings)
            compile_forward(self.model)
        self.loader = training_loader(recipe, self.data, self.device)
        check_methods(recipe, self.model, self.data)
        self.show_progress = show_progress
        self._wishes, self._tracker = Wishes(), Tracker()
        self.folder = processes.by_first(
            lambda: open_run(out, self.data) if resume else create_run(out, recipe, self.data, self.device)
        )
        resumed = processes.by_first(lambda: checkpoint.exists(self.folder.checkpoints / "last"))
        if resume and not resumed and start is None and (run := self.folder.parent_run) is not None:
            raise InputError(f"branch {self.folder.path} has no checkpoint yet; resume its run: --resume {run.path}")
        if start is not None and not resumed:
            checkpoint.load_training(start.checkpoints / "last", self.model)
        shards = self.settings.strategy == "fsdp" and processes.count() > 1
        trained = sharded(self.model) if shards else self.model
        self.live = recipe.method.bind(trained, attack=recipe.attack, seed=self.settings.seed)
        self.optimizer = make_optimizer(self.live, self.settings)
        self._faults = FaultWatch(self.settings.nonfinite, self.folder)
        self._updater = Updater(self.fabric, self.live, self.optimizer, self.settings)
        self._state = RunState(self.model, self.live, self.optimizer, self.folder)
        if resumed:
            self._state.go_on_from("last")
        elif start is not None:
            self._state.continue_from(start, recipe)

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self._state.progress

    # -- the run ----------------------------------------------------------------------------------

    def fit(self) -> RunFolder:
        """Train to the end, evaluate the last and the best checkpoint on test images, then run the branches.

        Returns:
            The run folder.

        Raises:
            Interrupted: The process was asked to stop; the checkpoint is written.
            InputError: A gradient or the loss became infinite; the checkpoint from before is kept.
        """
        if processes.by_first(lambda: self.folder.finished):
            return self.folder
        with ExitStack() as held:

            def lock() -> None:
                held.enter_context(self.folder.locked())

            processes.by_first(lock)
            with tracked(self.settings.logger, self.folder) as self._tracker:
                self._train()
            self._branches()
            facts = {"epochs": self.progress.epoch, "method": self.recipe.method.label, **self.live.facts()}
            processes.by_first(lambda: self.folder.write_finished(facts))
        return self.folder

    def _train(self) -> None:
        with (
            self._wishes.heard(),
            random_state_kept(self.model),
            self._shown_progress() as progress,
        ):
            while self.progress.epoch < self.recipe.stop_epoch and not self._over():
                self._epoch(progress)
            self._finish()
            self._stop_if_asked()
        self.live.release()
        try:
            with processes.sigterm_interrupts():
                measured = evaluate_checkpoints(self.model, self.data, self.recipe, self.folder)
        except KeyboardInterrupt:
            raise Interrupted from None
        self._tracker.log({"test": measured}, epoch=self.progress.epoch)

    def _branches(self) -> None:
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

    def _epoch(self, progress: EpochProgress) -> None:
        now = self.progress
        started = time.perf_counter() - now.seconds
        if now.step == 0:
            self._epoch_start()
        self._updater.epoch_start()
        self._faults.begin(now.sums, now.step)
        self.live.model.train()
        for batch in self.loader.epoch(now.epoch, start_step=now.step):
            self._step(batch)
            now.skipped += self.settings.batch_size // processes.count() - len(batch.y)
            now.step += 1
            progress.at(now.epoch * self.loader.steps_per_epoch + now.step)
            self._wishes.look()  # once per step: a wish that comes later waits for the next
            save = self._wishes.save or self._checkpoint_due()
            if save or now.step % LOOK_EVERY == 0:
                self._look_for_faults()
            if save:
                self._means()  # weights that a loss without a number has spoiled are not saved
                now.seconds = time.perf_counter() - started
                self._state.save("last")
            if self._wishes.stop:
                raise Interrupted
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now.seconds = time.perf_counter() - started
        self._look_for_faults()
        self._epoch_end(progress)

    def _epoch_start(self) -> None:
        now, epoch = self.progress, self.progress.epoch
        size = min(len(self.data.train), max(4, self.live.probe_size))
        probe = datasets.probe(
            self.data.train, count=size, seed=self.settings.seed, position=epoch, device=self.device, batch_size=size
        )
        few = Batch(probe[0].x[:4], probe[0].y[:4], torch.arange(min(4, size), device=self.device))
        if not now.pgd_at_flops:
            bare = deepcopy(self._live_in_one_piece())
            bare.release()  # PGD-AT trains the network itself: no adapters, nothing frozen
            now.pgd_at_flops = flops_per_image(PGDAT().bind(bare.model, attack=self.recipe.attack), few)
        selection = self.live.epoch_start(epoch, [(b.x, b.y) for b in probe], optimizer=self.optimizer)
        now.sums = {}
        if selection is not None:
            self._write_selection(selection)
        begins = any(getattr(method, "start_epoch", 0) == epoch for method in self.recipe.method.methods)
        if selection is not None or begins or not now.flops:
            now.flops = flops_per_image(self._live_in_one_piece(), few)

    def _live_in_one_piece(self) -> Live:
        """The methods as they stand; if the weights are dealt out, on a copy of the network."""
        if self.live.model is self.model:
            return self.live
        twin = self.recipe.method.bind(deepcopy(self.model), attack=self.recipe.attack, seed=self.settings.seed)
        twin.load_state_dict(self.live.state_dict())
        return twin

    def _write_selection(self, selection: Selection) -> None:
        report = {"epoch": selection.epoch, "selected": selection.layers, **selection.report.to_dict()}
        processes.by_first(lambda: self.folder.write_report(selection.epoch, report))
        self._tracker.log(
            {"criticality": {row.name: row.criticality for row in selection.report.rows}}, epoch=selection.epoch
        )

    def _step(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
        for replay in range(self.live.replays):
            self._update(batch, replay)

    def _update(self, batch: Batch, replay: int) -> None:
        now = self.progress
        terms = self._updater.update(batch, now.epoch, now.step, *([replay] if replay else []))
        epoch_sums.add(now.sums, terms, step=now.step, replays=self.live.replays)

    def _lr(self) -> float:
        """The rate of the coming step: the schedule, counted from where the method wants it, times its factor."""
        now, start = self.progress, self.live.schedule_start
        done = now.epoch - start + now.step / self.loader.steps_per_epoch
        lr = self.settings.lr_at(done / (self.settings.epochs - start)) * self.live.lr_scale
        return lr * 0.5 ** len(self._halvings()) if self.settings.schedule == "auto" else lr

    def _halvings(self) -> list[int]:
        """After which epochs of this run, or branch, the automatic schedule halves the rate."""
        now = self.progress
        robust = [*now.past, *(row["validation"]["robust"] for row in now.log)]
        before = now.epoch - len(robust)
        return [before + epoch for epoch in halvings(robust, self.settings.epochs - before)]

    def _epoch_end(self, progress: EpochProgress) -> None:
        now = self.progress
        means = self._means()
        norm, left_out = means.pop("gradient_norm"), epoch_sums.left_out(now.sums)
        skipped = round(processes.count() * processes.mean(now.skipped))
        lr = self.optimizer.param_groups[0]["lr"]
        epoch = now.epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "method": self.recipe.method.label,
            "losses": means,
            "gradient_norm": norm,
            "lr": lr,
            "seconds": now.seconds,
            "images_per_second": processes.count() * self.loader.images_per_epoch / now.seconds,
            **({"skipped_images": skipped} if skipped else {}),
            **({"skipped_updates": left_out} if left_out else {}),
            "trainable_share": self._trainable_share(),
            "selected": self.live.selected,
            "gflops_per_image": now.flops / 1e9,
            "pgd_at_gflops_per_image": now.pgd_at_flops / 1e9,
            **self.live.facts(),
        }
        self.live.epoch_end((batch.x, batch.y) for batch in in_order(self.data.train, self.recipe, self.device))
        if epoch % self.settings.validate_every == 0 or epoch == self.recipe.stop_epoch:
            row |= validate(self._state.network(), self.data, self.recipe)
        fell = collapse(now.log, row, max_drop=self.settings.max_drop)
        if fell is not None and self.settings.max_drop is not None:
            self._stop_collapsed(row, progress)
            return
        if fell is not None:
            row["collapse"] = fell
            if processes.rank() == 0:
                message = (
                    f"{self.folder.path.name}: {fell} in epoch {epoch}: catastrophic overfitting;"
                    " train.max_drop=0.2 ends a run there"
                )
                warnings.warn(message, Notice, stacklevel=2)
        now.epoch, now.step = epoch, 0
        now.log.append(row)
        now.seconds, now.skipped = 0.0, 0
        better = "validation" in row and row["validation"]["robust"] > now.best
        if better:
            now.best, now.best_epoch = row["validation"]["robust"], now.epoch
        # in this order, a kill between two of them is made good when the epoch is repeated
        if better:
            self._state.save("best")
        if self.settings.schedule == "auto" and now.epoch in self._halvings():
            self._state.take_up_best()
        processes.by_first(lambda: self.folder.write_log(now.log))
        self._tracker.log(row, epoch=epoch)
        if self.settings.max_drop is not None and "validation" in row:
            self._state.save("validated")
        self._state.save("last")
        progress.say(epoch_line(self.folder.path.name, row), status=epoch_status(now.log))
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        self._wishes.look()
        if self._wishes.stop:
            raise Interrupted

    def _stop_collapsed(self, row: dict[str, Any], progress: EpochProgress) -> None:
        """End the run as it was at the validation before; the log tells what was seen."""
        row["ended"] = f"robust validation accuracy fell by more than train.max_drop={self.settings.max_drop:g}"
        processes.by_first(lambda: self.folder.write_log([*self.progress.log, row]))
        # not "last": that may be from inside this epoch, or from one that was not validated
        self._state.go_on_from("validated")
        now = self.progress
        now.collapsed = True
        self._state.save("last")
        progress.say(epoch_line(self.folder.path.name, row), status=epoch_status([row]))
        progress.say(
            f"{self.folder.path.name}: {row['ended']} in epoch {row['epoch']}: catastrophic overfitting; "
            f"the run ends with the checkpoint of epoch {now.epoch}",
            status="collapsed",
        )

    def _finish(self) -> None:
        """Let the method choose on held-out images, and keep the network that it then means."""
        self.live.finish((batch.x, batch.y) for batch in in_order(self.data.validation, self.recipe, self.device))
        if self.live.deployed() is not self.model:
            self._state.save("last")

    def _shown_progress(self) -> AbstractContextManager[EpochProgress]:
        steps, now = self.loader.steps_per_epoch, self.progress
        return epoch_progress(
            f"{self.folder.path.name}: {self.recipe.method.label}",
            total=self.recipe.stop_epoch * steps,
            done=now.epoch * steps + now.step,
            images_per_step=self.settings.batch_size,
            show=self.show_progress,
            silent=processes.rank() > 0,
        )

    def _means(self) -> dict[str, float]:
        """The mean of each loss term over the steps of this epoch so far; refuses to go on if one is not finite."""
        now = self.progress
        means = epoch_sums.means(now.sums, steps=now.step, replays=self.live.replays)
        check_finite(means, epoch=now.epoch, run=self.folder)
        return means

    def _look_for_faults(self) -> None:
        now = self.progress
        self._faults.look(
            now.sums,
            epoch=now.epoch,
            step=now.step,
            replays=self.live.replays,
            batch_at=lambda step: next(iter(self.loader.epoch(now.epoch, start_step=step))),
        )

    def _trainable_share(self) -> float:
        trainable: int = sum(parameter.numel() for parameter in self.live.trainable())
        return trainable / sum(parameter.numel() for parameter in self.live.parameters())

    # -- stopping and resuming --------------------------------------------------------------------

    def _over(self) -> bool:
        """Whether the run ends early: it collapsed, or its patience is over."""
        patience, now = self.settings.patience, self.progress
        measured = bool(now.log) and "validation" in now.log[-1]
        return now.collapsed or (patience is not None and measured and now.epoch - now.best_epoch >= patience)

    def _checkpoint_due(self) -> bool:
        every = self.settings.checkpoint_steps
        return every is not None and self.progress.step % every == 0
