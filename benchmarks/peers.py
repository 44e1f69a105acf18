"""PGD and PGD-AT of other libraries behind one call each, for `benchmarks/speed.py`; alone: what a call of each costs.

    pip install "toughen[bench]"
    python benchmarks/peers.py

The extra `bench` holds what pip resolves beside Toughen without changing another package. The others:

- torchattacks 3.5.1 asks for requests 2.25, and so for idna 2.10, which makes pip choose old httpx2 and httpcore2 for
  huggingface_hub. It needs none of them to attack: `pip install --no-deps torchattacks`. It also installs a copy of
  robustbench under that name; keep it out of an environment with the real one.
- adv-lib 0.2.8 on Python 3.11: its visdom can only be built by an old setuptools. With pip 25.3 or later:
  `echo "setuptools<81" > build.txt; pip install --build-constraint build.txt adv-lib`.

Every adapter lets the library do what its users see, in eval mode, with what it adds of its own: a check whether the
attack succeeded, a copy to numpy, gradients of weights that nobody asked for. The random starts of ART come from
numpy's global state, those of the others from torch's.
"""

import argparse
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from toughen import PGD, ThreatModel, models
from toughen.errors import first_line

Perturb = Callable[[nn.Module, Tensor, Tensor], Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]


@dataclass(frozen=True)
class Peer:
    """A library that can be timed.

    Attributes:
        name: Of the distribution.
        version: Of the distribution.
        perturb: Returns x_adv, detached, by l_inf PGD with a random start for a model, x ([B, C, H, W], in [0, 1]) and
            y ([B], int64). The mode of the model is as before; gradients may be left on its weights.
        step: One step of PGD-AT by the library's own trainer for a model, an optimizer, x and y, which leaves the model
            in train mode; None where the library only attacks.
    """

    name: str
    version: str
    perturb: Perturb
    step: Step | None = None


@dataclass(frozen=True)
class Settings:
    """Of l_inf PGD; eps and step_size in pixel units of [0, 1]. ART wants to know the number of classes."""

    eps: float
    step_size: float
    steps: int
    num_classes: int


def installed(*, eps: float, step_size: float, steps: int, num_classes: int = 10) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that import here, and why each of the others does not.

    Args:
        eps: Radius of the l_inf ball, in pixel units of [0, 1].
        step_size: Length of one step, in the same units.
        steps: Number of steps, at least 1.
        num_classes: Of the models to come.
    """
    settings = Settings(eps, step_size, steps, num_classes)
    peers: list[Peer] = []
    absent: dict[str, str] = {}
    for name, load in LIBRARIES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside the library
                perturb, step = load(settings)
        except Exception as error:  # a library older than what it imports can fail in any way
            absent[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            peers.append(Peer(name, version(name), perturb, step))
    return peers, absent


def load_art(settings: Settings) -> tuple[Perturb, Step]:
    """Adapt ART: numpy in and out. Its trainer would attack 32 images at a time; here it attacks the batch at once."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    ball = {"eps": settings.eps, "eps_step": settings.step_size, "max_iter": settings.steps, "num_random_init": 1}

    def classifier(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Any:
        return PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            tuple(x.shape[1:]),
            settings.num_classes,
            optimizer=optimizer,
            clip_values=(0.0, 1.0),
            device_type="gpu" if x.is_cuda else "cpu",
        )

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = ProjectedGradientDescentPyTorch(classifier(model, x), batch_size=len(x), verbose=False, **ball)
        with evaluated(model):
            return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        trainer = AdversarialTrainerMadryPGD(classifier(model, x, optimizer), **ball)
        trainer.attack.set_params(batch_size=len(x))
        with redirect_stderr(io.StringIO()):  # its progress bars
            trainer.fit(x.cpu().numpy(), y.cpu().numpy(), batch_size=len(x), nb_epochs=1)

    return perturb, step


def load_torchattacks(settings: Settings) -> tuple[Perturb, None]:
    """Adapt torchattacks, which sets the mode of the model itself."""
    import torchattacks

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = torchattacks.PGD(
            model, eps=settings.eps, alpha=settings.step_size, steps=settings.steps, random_start=True
        )
        x_adv: Tensor = attack(x, y)
        return x_adv

    return perturb, None


def load_foolbox(settings: Settings) -> tuple[Perturb, None]:
    """Adapt foolbox."""
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=settings.step_size, steps=settings.steps, random_start=True)

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with evaluated(model):
            bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            _, x_adv, _ = attack(bounded, x, y, epsilons=settings.eps)
        return x_adv

    return perturb, None


def load_adv_lib(settings: Settings) -> tuple[Perturb, None]:
    """Adapt adv-lib: it returns the last iterate that it saw fool, else the image itself, and never sees the last."""
    from adv_lib.attacks import pgd_linf

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with evaluated(model):
            x_adv: Tensor = pgd_linf(
                model, x, y, settings.eps, steps=settings.steps, absolute_step_size=settings.step_size
            )
        return x_adv

    return perturb, None


LIBRARIES: dict[str, Callable[[Settings], tuple[Perturb, Step | None]]] = {
    "adversarial-robustness-toolbox": load_art,
    "torchattacks": load_torchattacks,
    "foolbox": load_foolbox,
    "adv-lib": load_adv_lib,
}


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Set the mode as the users of a library that leaves it alone do."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Passes(TorchDispatchMode):
    """Counts images through convolutions, forwards and backwards, and how often a gradient of a weight was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = self.of_weights = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution:
            self.forwards += len(args[0])
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            _, of_weight, _ = args[-1]
            self.backwards += len(args[0])
            self.of_weights += len(args[0]) * of_weight
        return func(*args, **(kwargs or {}))


def page(*, eps: float, step_size: float, steps: int, batch_size: int) -> str:
    """Count a call of each on ResNet-18 in train mode, and say what its perturbation does to the loss in eval mode."""
    torch.manual_seed(0)
    np.random.seed(0)  # the state that ART draws from
    x = torch.rand(batch_size, 3, 32, 32)
    model = models.create("resnet18", num_classes=10, width=16, seed=0)
    with torch.no_grad():
        y = model.eval()(x).argmax(dim=1)  # so that every image has to be fooled
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())

    def row(call: str, run: Callable[[], Tensor | None]) -> str:
        model.train().zero_grad()
        with Passes() as passes:
            x_adv = run()
        counted = (passes.forwards, passes.backwards, passes.of_weights)
        cells = [call, *(f"{count / convolutions / batch_size:.2f}" for count in counted)]
        if x_adv is None:
            cells += ["", ""]
        else:
            with torch.no_grad():
                loss = F.cross_entropy(model.eval()(x_adv), y).item()
            cells += [f"{(x_adv - x).abs().max().item() / eps:.4f}", f"{loss:.3f}"]
        return f"| {' | '.join(cells)} |"

    attack = PGD(ThreatModel(eps=eps), step_size=step_size, steps=steps)
    peers, absent = installed(eps=eps, step_size=step_size, steps=steps)
    lines = ["| call | forwards | backwards | of these for weights | distance / eps | loss |", "|---|" + "---|" * 5]
    lines += [row("no attack", lambda: x), row("toughen", partial(attack, model, x, y))]
    lines += [row(f"{peer.name} {peer.version}", partial(peer.perturb, model, x, y)) for peer in peers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for peer in peers:  # last, since the model changes
        if peer.step is not None:
            lines.append(row(f"{peer.name}, its training step", partial(peer.step, model, optimizer, x, y)))
    return "\n".join([*lines, *(f"left out: {name}, {reason}" for name, reason in absent.items())])


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--step-size", type=float, default=2 / 255)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    print(page(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
