"""Training methods in Lightning's Trainer, as a callback. Owns what Lightning's hooks are used for; knows no recipe."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from toughen.attacks import Attack
from toughen.criticality.selection import Selection
from toughen.errors import InputError
from toughen.layers.taps import random_state_kept
from toughen.methods import Stack, Wrapper
from toughen.objectives import Live, Objective
from toughen.rng import generator, stream_seed
from toughen.types import StepOutput, check_images

try:
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError:
    raise ModuleNotFoundError("Lightning is not installed; get it with: pip install 'toughen[lightning]'") from None

Pairs = Iterable[tuple[Tensor, Tensor]]


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
        method: Objective | Wrapper | Stack,
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
        self.selections: dict[int, Selection] = {}
        self._live: Live | None = None
        self._epoch: int | None = None  # the last one that was begun
        self._wrapped: tuple[bool, ...] = ()  # which parameters asked for a gradient when DDP was made
        self._handles: list[Any] = []
        self._rates: list[Any] = []  # of the optimizer's groups, as scheduled
        self._looked = False

    # -- what the user calls ----------------------------------------------------------------------

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Perturb a batch and return the loss on it: x [B, C, H, W] in [0, 1], y [B]; for ``step="call"``.

        Raises:
            InputError: The images are not in [0, 1].
        """
        if not self._looked:
            check_images(x, (0.0, 1.0))
            self._looked = True
        return self.live(x, y)

    @property
    def live(self) -> Live:
        """The method, bound to the network.

        Raises:
            InputError: ``fit`` has not begun.
        """
        if self._live is None:
            raise InputError("CLATCallback has no network before trainer.fit; give it in Trainer(callbacks=[...])")
        return self._live

    def deployed(self) -> nn.Module:
        """Return the network to evaluate and to keep: the module's own, or the average of a method that has one."""
        return self.live.deployed()

    # -- before and after -------------------------------------------------------------------------

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Bind the method, before optimizers are made and checkpoints are read."""
        if stage != "fit":
            return
        self._check_trainer(trainer, pl_module)
        model = getattr(pl_module, self.network, None)
        if not isinstance(model, nn.Module):
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"{type(pl_module).__name__} has no network {self.network!r}; name one with network=, among: {names}"
            )
        self._live = live = self.method.bind(model, attack=self.attack, seed=self.seed)
        self._epoch, self._looked = None, False
        _check_method(live, self.method)
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
        (optimizer,) = trainer.optimizers
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, parameter in self.live.named_parameters().items() if id(parameter) not in held]
        if lacking:
            raise InputError(
                f"the optimizer lacks {len(lacking)} parameters of {self.network!r}, such as {lacking[0]}; give it"
                " self.parameters() in configure_optimizers: the callback freezes what is not to train"
            )
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step(optimizer)),
            optimizer.register_step_post_hook(lambda *_: self._after_step(optimizer)),
        ]
        self._wrapped = self._trains()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look whether method and network fit each other, before hours are spent."""
        x, _ = self._probe(trainer, 1)[0]
        self.live.check(x[:1])

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let the method choose on validation images, where it has to."""
        loaders = trainer.val_dataloaders or ()
        loader = loaders if isinstance(loaders, DataLoader) else next(iter(loaders), ())
        self.live.finish(_pair(_on_device(trainer, batch)) for batch in loader)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give module and optimizer back."""
        if stage == "fit":
            self._give_back(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Give module and optimizer back; Lightning does not tear down after an error."""
        self._give_back(pl_module)

    def _give_back(self, pl_module: lightning.LightningModule) -> None:
        pl_module.__dict__.pop("training_step", None)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._live is not None:
            self._live.release()

    # -- the epoch --------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what the method does before an epoch, unless the checkpoint is from inside of it."""
        epoch = trainer.current_epoch
        if epoch == self._epoch:
            return
        probe = self._probe(trainer, self.live.probe_size) if self.live.probe_size else []
        selection = self.live.epoch_start(epoch, probe, optimizer=trainer.optimizers[0])
        if selection is not None:
            self.selections[epoch] = selection
        self._epoch = epoch
        if isinstance(trainer.strategy, DDPStrategy) and self._trains() != self._wrapped:
            trainer.strategy.model = pl_module  # first: two at once would both exchange
            trainer.strategy.configure_ddp()
            self._wrapped = self._trains()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do what the method does after an epoch, for example re-estimate the statistics of an average."""
        self.live.epoch_end(self._all_images(trainer))

    def _trains(self) -> tuple[bool, ...]:
        return tuple(parameter.requires_grad for parameter in self.live.parameters())

    def _probe(self, trainer: lightning.Trainer, count: int) -> list[tuple[Tensor, Tensor]]:
        """Training images: at least ``count`` of those that were given, or as many at random, the same for all."""
        if self.probe is not None:
            found: list[tuple[Tensor, Tensor]] = []
            for batch in self.probe:
                found.append(_pair(_on_device(trainer, batch)))
                if sum(len(y) for _, y in found) >= count:
                    break
            return found
        loader = _map_loader(trainer)
        draw = generator(self.seed, "probe", trainer.current_epoch)
        chosen = torch.randperm(len(loader.dataset), generator=draw)[:count].tolist()  # type: ignore[arg-type]
        with random_state_kept(self.live.model):  # transforms draw from it
            torch.manual_seed(stream_seed(self.seed, "probe's transforms", trainer.current_epoch))
            return list(_read(trainer, loader, chosen))

    def _all_images(self, trainer: lightning.Trainer) -> Iterator[tuple[Tensor, Tensor]]:
        loader = _map_loader(trainer)
        with random_state_kept(self.live.model):
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
        if self.live.calls == 0:
            name = type(pl_module).__name__
            raise InputError(f"training_step of {name} has not called the callback; return callback(x, y).loss there")

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the rate for the length of the step, so that schedulers never see it."""
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.live.lr_scale

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.live.step_end()

    # -- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning puts into its checkpoints."""
        return {"epoch": self._epoch, "method": self.live.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; Lightning has loaded the weights before."""
        self._epoch = state_dict["epoch"]
        self.live.load_state_dict(state_dict["method"])


def _check_method(live: Live, method: Objective | Wrapper | Stack) -> None:
    """Refuse what asks for more of a loop than Lightning's does."""
    if live.own_parameters():
        raise InputError(
            f"{method.label} trains parameters of its own, which no LightningModule holds; `toughen train`"
        )
    if live.replays > 1:
        raise InputError(
            f"{method.label} uses each batch {live.replays} times, and Lightning takes one step for each; leave it to"
            " `toughen train`"
        )
    for member in method.methods if isinstance(method, Stack) else (method,):
        if getattr(member, "lr", "continue") == "restart" and getattr(member, "start_epoch", 0):
            raise InputError(f"{member.label} lr='restart' has no effect on Lightning's schedulers; set lr='continue'")


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
