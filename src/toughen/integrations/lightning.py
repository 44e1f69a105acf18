"""Training methods in Lightning's Trainer, as a callback. Owns what Lightning's hooks are used for; knows no recipe."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.integrations.guest import AnyMethod, Guest, Pairs, given_first
from toughen.layers.taps import random_state_kept
from toughen.rng import stream_seed
from toughen.types import StepOutput

try:
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError:
    raise ModuleNotFoundError("Lightning is not installed; get it with: pip install 'toughen[lightning]'") from None


class CLATCallback(lightning.Callback):
    """Train a part of a LightningModule with CLAT, or with any other method or stack.

    The module's optimizer must hold all parameters of the network; frozen ones have no gradient, so that momentum and
    weight decay leave them alone too. Selection, momentum and random draws are part of Lightning's checkpoints, so that
    ``fit(ckpt_path=...)`` goes on exactly. After ``fit`` the network is plain again, and ``deployed`` the one to keep.

    With several processes (DDP) the network is wrapped anew when other layers are to train: DDP exchanges the
    gradients of those that asked for one when it was made, and of nothing else.

    Args:
        method: For example ``CLAT(k=3)`` or ``stack(TRADES(), CLAT(k=3))``.
        attack: Finds the perturbations.
        network: Name of the module's attribute that maps images in [0, 1] to logits; it normalises inside.
        step: ``"wrap"`` puts the method's loss in the place of ``training_step``, for batches that begin with images
            and labels; ``"call"`` leaves ``training_step`` as it is, which then returns ``callback(x, y).loss``.
        probe: Training images without augmentation, as (x, y) batches, for methods that measure something. None takes
            random images of the training DataLoader's dataset, through its transforms.
        seed: Of random starts and of the images that are measured.
    """

    def __init__(
        self,
        method: AnyMethod,
        *,
        attack: Attack,
        network: str = "model",
        step: Literal["wrap", "call"] = "wrap",
        probe: Pairs | None = None,
        seed: int = 0,
    ) -> None:
        if step not in ("wrap", "call"):
            raise InputError(f"CLATCallback step is {step!r}; allowed: wrap, call")
        self.method, self.attack, self.network, self.step, self.probe = method, attack, network, step, probe
        self.seed = seed
        self._guest: Guest | None = None
        self._wrapped: tuple[bool, ...] = ()  # which parameters asked for a gradient when DDP was made

    # -- what the user calls ----------------------------------------------------------------------

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Perturb a batch and return the loss on it: x [B, C, H, W] in [0, 1], y [B]; for ``step="call"``.

        Raises:
            InputError: The images are not in [0, 1].
        """
        return self.guest(x, y)

    @property
    def guest(self) -> Guest:
        """The method, bound to the network.

        Raises:
            InputError: ``fit`` has not begun.
        """
        if self._guest is None:
            raise InputError("CLATCallback has no network before trainer.fit; give it in Trainer(callbacks=[...])")
        return self._guest

    @property
    def selections(self) -> dict[int, Selection]:
        """The selections of layers of the last ``fit``, by the epoch before which each was made."""
        return self.guest.selections

    def deployed(self) -> nn.Module:
        """Return the network to evaluate and to keep: the module's own, or the average of a method that has one."""
        return self.guest.live.deployed()

    # -- before and after -------------------------------------------------------------------------

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Bind the method, before optimizers are made and checkpoints are read."""
        if stage != "fit":
            return
        self._check_trainer(trainer, pl_module)
        if self._guest is not None:
            self._guest.leave()
        model = getattr(pl_module, self.network, None)
        if not isinstance(model, nn.Module):
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no network {self.network!r}; name one with network=, among: {names}"
            )
        self._guest = Guest(self.method, model, attack=self.attack, host="Lightning", seed=self.seed)
        if self.step == "wrap":
            pl_module.training_step = lambda batch, *_: self._training_step(pl_module, batch)

    def _check_trainer(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(trainer.strategy).__name__
            raise InputError(f"CLATCallback does not know how {name} exchanges gradients; use one device, or 'ddp'")
        if self.step == "wrap" and not pl_module.automatic_optimization:
            name = type(pl_module).__name__
            raise InputError(f"{name} optimizes by hand; use CLATCallback(step='call') and its loss in training_step")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take hold of the optimizer, which exists now."""
        if len(trainer.optimizers) != 1:
            raise InputError(
                f"CLATCallback needs one optimizer; configure_optimizers returns {len(trainer.optimizers)}"
            )
        self.guest.attach(trainer.optimizers[0], where="configure_optimizers")
        self._wrapped = self.guest.trains()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look whether method and network fit each other, before hours are spent."""
        x, _ = self._probe(trainer, 1)[0]
        self.guest.live.check(x[:1])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let the method choose on validation images, where it has to."""
        loaders = trainer.val_dataloaders or ()
        loader = loaders if isinstance(loaders, DataLoader) else next(iter(loaders), ())
        self.guest.live.finish(_pair(_on_device(trainer, batch)) for batch in loader)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give module and optimizer back."""
        if stage == "fit":
            pl_module.__dict__.pop("training_step", None)
            self.guest.leave()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give step and optimizer back, since Lightning does not tear down after an error.

        The network stays as it trains, for the checkpoint that may be written now; the next ``fit`` gives it back.
        """
        pl_module.__dict__.pop("training_step", None)
        if self._guest is not None:
            self._guest.detach()

    # -- the epoch --------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what the method does before an epoch, unless the checkpoint is from inside of it."""
        guest = self.guest
        guest.epoch_start(trainer.current_epoch, lambda size: self._probe(trainer, size), trainer.optimizers[0])
        if isinstance(trainer.strategy, DDPStrategy) and guest.trains() != self._wrapped:
            trainer.strategy.model = pl_module  # first: two at once would both exchange
            trainer.strategy.configure_ddp()
            self._wrapped = guest.trains()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what the method does after an epoch, for example re-estimate the statistics of an average."""
        self.guest.live.epoch_end(self._all_images(trainer))

    def _probe(self, trainer: lightning.Trainer, count: int) -> list[tuple[Tensor, Tensor]]:
        if self.probe is not None:
            return given_first((_pair(_on_device(trainer, batch)) for batch in self.probe), count)
        loader, epoch = _map_loader(trainer), trainer.current_epoch
        chosen = self.guest.chosen(count, len(loader.dataset), epoch)  # type: ignore[arg-type]
        with random_state_kept(self.guest.live.model):  # transforms draw from it
            torch.manual_seed(stream_seed(self.seed, "probe's transforms", epoch))
            return list(_read(trainer, loader, chosen))

    def _all_images(self, trainer: lightning.Trainer) -> Iterator[tuple[Tensor, Tensor]]:
        loader = _map_loader(trainer)
        with random_state_kept(self.guest.live.model):
            yield from _read(trainer, loader, range(len(loader.dataset)))  # type: ignore[arg-type]

    # -- the step ---------------------------------------------------------------------------------

    def _training_step(self, pl_module: lightning.LightningModule, batch: Any) -> Tensor:
        output = self(*_pair(batch))
        terms = {"loss": output.loss.detach(), **output.terms}
        pl_module.log_dict({f"train/{name}": value for name, value in terms.items()}, on_step=False, on_epoch=True)
        return output.loss

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell where nobody uses the method."""
        if self.guest.live.calls == 0:
            name = type(pl_module).__name__
            raise InputError(f"training_step of {name} has not called the callback; return callback(x, y).loss there")

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning puts into its checkpoints; before ``fit`` there is nothing."""
        return {} if self._guest is None else self._guest.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; Lightning has loaded the weights before."""
        self.guest.load_state_dict(state_dict)


def _map_loader(trainer: lightning.Trainer) -> DataLoader[Any]:
    """The training DataLoader, whose dataset can be read by index."""
    loader = trainer.train_dataloader
    if not (isinstance(loader, DataLoader) and hasattr(loader.dataset, "__len__")):
        raise InputError(
            f"the training data are a {type(loader).__name__} that can't be read by index; give some of its images as"
            " probe=, a list of (x, y) batches"
        )
    return loader


def _read(
    trainer: lightning.Trainer, loader: DataLoader[Any], chosen: Iterable[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    some = DataLoader(
        Subset(loader.dataset, list(chosen)),
        batch_size=loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # its own: the order of the training images must not depend on this
    )
    for batch in some:
        yield _pair(_on_device(trainer, batch))


def _on_device(trainer: lightning.Trainer, batch: Any) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, list | tuple) and len(batch) > 1 and all(isinstance(part, Tensor) for part in batch[:2])):
        raise InputError(
            f"a batch is a {type(batch).__name__}, not images and labels; use CLATCallback(step='call'), and probe="
            " a list of (x, y) batches"
        )
    return batch[0], batch[1]
