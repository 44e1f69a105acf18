"""Training methods in the Hugging Face Trainer. Owns which of its hooks are used for what; knows no recipe."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.integrations.guest import AnyMethod, Guest, Pairs, given_first
from toughen.layers.taps import random_state_kept
from toughen.models import Normalize
from toughen.rng import stream_seed

try:
    import transformers
    from transformers.trainer_utils import get_last_checkpoint
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "transformers is not installed; get it with: pip install 'toughen[transformers]'"
    ) from None

STATE = "method.pt"


class ImageClassifier(nn.Module):
    """A network of transformers that takes images in [0, 1], normalises them itself, and returns logits.

    So it is a network for every function of toughen; and with labels it returns what the Trainer wants to see.

    Args:
        model: For example ``ViTForImageClassification``; its weights are saved by ``classifier.net.save_pretrained``.
        mean: One number per channel in pixel units of [0, 1], as ``image_mean`` of its image processor.
        std: One number per channel, as ``image_std``.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Return the logits [B, K] of images [B, C, H, W] in [0, 1]; with labels, a dict of ``loss`` and ``logits``."""
        logits = self.net(pixel_values=self.normalize(pixel_values)).logits
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CLATTrainer(transformers.Trainer):
    """The Trainer, whose training loss is that of CLAT, or of any other method or stack.

    Its data sets give ``pixel_values`` in [0, 1] (``do_normalize=False`` in the image processor) and ``labels``. What
    it evaluates is clean images, as ever; ``toughen.evaluate(trainer.deployed(), ...)`` measures more. The state of the
    method lies in each checkpoint folder as ``method.pt``, so that ``resume_from_checkpoint`` goes on exactly.

    Args:
        model: Images in [0, 1] to logits; with labels, a dict of loss and logits.
        args: As for the Trainer; one process on one device.
        method: For example ``CLAT(k=3)`` or ``stack(TRADES(), CLAT(k=3))``.
        attack: Finds the perturbations.
        probe: Training images without augmentation, as (x, y) batches, for methods that measure something. None takes
            random images of ``train_dataset``, through its transforms.
        others: Further arguments of the Trainer.

    Raises:
        InputError: Several processes or devices, whose gradients the Trainer would not exchange for such a loss.
    """

    def __init__(
        self,
        model: ImageClassifier,
        args: transformers.TrainingArguments | None = None,
        *,
        method: AnyMethod,
        attack: Attack,
        probe: Pairs | None = None,
        **others: Any,
    ) -> None:
        super().__init__(model, args, **others)
        devices = max(self.args.world_size, self.args.n_gpu)
        if devices > 1:
            raise InputError(
                f"CLATTrainer works in one process on one device, and here are {devices}; for several use"
                " `toughen train` or CLATCallback of toughen.integrations.lightning, or set CUDA_VISIBLE_DEVICES=0"
            )
        self.method, self.attack, self.probe = method, attack, probe
        self._guest: Guest | None = None
        self._resumed: str | None = None
        self.add_callback(_Hooks(self))

    @property
    def guest(self) -> Guest:
        """The method, bound to the network.

        Raises:
            InputError: ``train`` has not begun.
        """
        if self._guest is None:
            raise InputError("CLATTrainer binds its method when training begins; call train() first")
        return self._guest

    @property
    def selections(self) -> dict[int, Selection]:
        """The selections of layers, by the epoch before which each was made."""
        return self.guest.selections

    def deployed(self) -> nn.Module:
        """Return the network to evaluate and to keep: the model, or the average of a method that has one."""
        return self.guest.live.deployed()

    def train(self, resume_from_checkpoint: str | bool | None = None, **others: Any) -> Any:
        """Train; see the Trainer. Afterwards the network is plain again."""
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resumed = found or None
        self._guest = Guest(self.method, self.model, attack=self.attack, host="the Trainer", seed=self.args.seed)
        try:
            self.guest.live.check(self.measured(1)[0][0][:1])
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **others)
            self.guest.live.finish(self.images(self.eval_dataset))
        finally:
            self.guest.leave()
        return done

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        """Return the method's loss in training, and the clean one in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **others)
        return self.guest(inputs["pixel_values"], inputs["labels"]).loss

    def begin(self) -> None:
        """Take hold of the optimizer, and of the state in the checkpoint that is gone on from."""
        self.guest.attach(self._optimizer, where="the Trainer's optimizers")
        if self._resumed is not None:
            file = Path(self._resumed) / STATE
            if not file.is_file():
                raise InputError(f"{file.parent} has no {STATE}: it was not written by CLATTrainer")
            self.guest.load_state_dict(torch.load(file, weights_only=True))

    def begin_epoch(self, epoch: int) -> None:
        """Do what the method does before an epoch."""
        self.guest.epoch_start(epoch, lambda size: self.measured(size, epoch), self._optimizer)

    def measured(self, count: int, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Return training images to measure on: those that were given, or as many at random."""
        if self.probe is not None:
            return given_first(((x.to(self.args.device), y.to(self.args.device)) for x, y, *_ in self.probe), count)
        chosen = self.guest.chosen(count, len(self.train_dataset), epoch)
        with random_state_kept(self.model):  # transforms draw from it
            torch.manual_seed(stream_seed(self.args.seed, "probe's transforms", epoch))
            return list(self.images(self.train_dataset, chosen))

    def images(self, dataset: Any, chosen: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over images of a data set, all of them if none are chosen, in batches as they are evaluated."""
        if dataset is None:
            return
        wanted = range(len(dataset)) if chosen is None else chosen
        for first in range(0, len(wanted), self.args.eval_batch_size):
            rows = [dataset[position] for position in wanted[first : first + self.args.eval_batch_size]]
            inputs = self._prepare_inputs(self.data_collator(rows))
            yield inputs["pixel_values"], inputs["labels"]

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The one that steps, inside of accelerate's."""
        accelerated: Any = self.optimizer
        found: torch.optim.Optimizer = accelerated.optimizer
        return found


class _Hooks(transformers.TrainerCallback):
    """Tells a trainer where its own loop is."""

    def __init__(self, trainer: CLATTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin_epoch(int((state.epoch or 0) + 1e-6))  # it is a sum of fractions

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with random_state_kept(self.trainer.model):
            self.trainer.guest.live.epoch_end(self.trainer.images(self.trainer.train_dataset))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.trainer.guest.state_dict(), folder / STATE)
