"""What the tests of each objective ask of it: its formula, steps of training, and a state that continues."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from as_found import same
from toughen.attacks import PGD
from toughen.layers import ModelView
from toughen.methods import CLAT, stack
from toughen.methods.wrapper import Wrapper
from toughen.objectives import Live, Objective
from toughen.types import AdversarialBatch, Batch, StepOutput, ThreatModel
from zoo import build, images

X, Y = images(6)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
X_ADV = images(6, seed=1)[0]  # far from X, so that every term of a loss is large
MISSING = torch.where(torch.tensor([True, False, True, True, False, True]), Y, -1)  # two images without a label
UNDER_CLAT = pytest.mark.parametrize(
    "clat", [(), (CLAT(k=1),), (CLAT(k=1, base="inner", lam=0.0),)], ids=["alone", "clat", "clat, inner loss"]
)


def sharp() -> nn.Module:
    """A network in float64, in train mode, that is sure of something else for each image."""
    model = build("nested").double()
    with torch.no_grad():
        model.head.fc.weight.mul_(2 / model(X.double()).std(dim=0).mean())
        model.head.fc.bias.sub_(model(X.double()).mean(dim=0))
    return model


def on_logits(objective: Objective, clean: Tensor, perturbed: Tensor, y: Tensor) -> StepOutput:
    """The loss where the logits are given: those of a model that returns its images."""
    return objective.loss(ModelView(nn.Identity()), AdversarialBatch(Batch(clean, y), perturbed))


def random_logits(count: int, num_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of clean and of perturbed images in float64, and labels."""
    draw = torch.Generator().manual_seed(seed)
    clean, perturbed = (3 * torch.randn(count, num_classes, dtype=torch.float64, generator=draw) for _ in range(2))
    return clean, perturbed, torch.randint(num_classes, (count,), generator=draw)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def found(objective: Objective, y: Tensor = Y, x_adv: Tensor = X_ADV) -> tuple[StepOutput, list[Tensor]]:
    """The loss of an objective on the sharp network, and its gradient."""
    model = sharp()
    output = objective.loss(ModelView(model), AdversarialBatch(Batch(X.double(), y), x_adv.double()))
    return output, gradients(model, output.loss)


def assert_formula(
    objective: Objective, formula: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor = Y, *, together: bool = False
) -> None:
    """Assert that loss and gradient are those of ``formula(logits of x, logits of x_adv, y)``, in float64.

    Args:
        objective: What is tested.
        formula: An independent reference.
        y: Labels of the six images.
        together: Whether one forward sees both kinds of images (batch norm is in train mode).
    """
    model, x, x_adv = sharp(), X.double(), X_ADV.double()
    logits = model(torch.cat((x, x_adv))).chunk(2) if together else (model(x), model(x_adv))
    expected = formula(*logits, y)
    output, gradient = found(objective, y)
    torch.testing.assert_close(output.loss, expected)
    assert not any(term.requires_grad for term in output.terms.values())
    for a, b in zip(gradient, gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


class Recorder:
    """An attack that takes note of what it is asked, and perturbs nothing."""

    threat = PGD2.threat
    random_start = True

    def __call__(self, model, x, y, **asked):
        self.asked = asked
        return x


def asked_of_attack(objective: Objective, batch: Batch, generator: torch.Generator | None = None) -> dict:
    """With which goal and start an objective calls its attack."""
    attack = Recorder()
    objective.perturb(nn.Identity(), batch, attack, generator=generator or torch.Generator())
    return attack.asked


def step(live: Live, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = live(X, Y).loss
    loss.backward()
    optimizer.step()
    live.step_end()
    return loss.detach()


def started(objective: Objective, *wrappers: Wrapper) -> tuple[Live, torch.optim.Optimizer]:
    live = stack(objective, *wrappers).bind(build("backwards"), attack=PGD2)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    live.epoch_start(0, [(X, Y)], optimizer=optimizer)
    return live, optimizer


def assert_trains(objective: Objective, *wrappers: Wrapper) -> None:
    """Assert that two steps have finite losses and move exactly the weights that are to be trained."""
    live, optimizer = started(objective, *wrappers)
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    losses = [step(live, optimizer), step(live, optimizer)]
    assert all(loss.isfinite() for loss in losses)
    assert losses[0] != losses[1]
    moved = {name.rpartition(".")[0] for name, p in live.model.named_parameters() if not same(p, before[name])}
    assert moved == set(live.selected or ("first", "second", "third", "head.fc"))


def assert_resumes(objective: Objective, *wrappers: Wrapper) -> None:
    """Assert that a state that went through a file continues with bit-identical steps."""
    live, optimizer = started(objective, *wrappers)
    step(live, optimizer)
    file = io.BytesIO()
    torch.save([live.model.state_dict(), live.state_dict(), optimizer.state_dict()], file)
    expected = [step(live, optimizer), step(live, optimizer)]
    file.seek(0)
    weights, state, momentum = torch.load(file, weights_only=True)
    again, fresh = started(objective, *wrappers)
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    fresh.load_state_dict(momentum)
    assert all(same(step(again, fresh), loss) for loss in expected)
