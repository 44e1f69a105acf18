"""Networks that mask gradients raise the flag that they should and no other; honest ones raise none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen import PGD, ThreatModel, models
from toughen.data import DataSettings, load
from toughen.errors import InputError
from toughen.evaluation.masking import check_model
from toughen.types import Batch
from zoo import FOREIGN, FOREIGN_IMAGE, ZOO, build, images

LINF = ThreatModel(eps=0.1)
L2 = ThreatModel(norm="l2", eps=0.8)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Networks built in a test are the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    test = load(DataSettings(name="digits")).test
    return test.images[:64] / 255, test.labels[:64]


@pytest.fixture(scope="module")
def standard() -> nn.Module:
    return trained(eps=0.0)


@pytest.fixture(scope="module")
def adversarial() -> nn.Module:
    return trained(eps=0.1)


def trained(*, eps: float) -> nn.Module:
    """A small network after eight rounds through the digits, about 90 % right."""
    train = load(DataSettings(name="digits")).train
    model = models.create("small_cnn", in_channels=1, width=8, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    draw = torch.Generator().manual_seed(0)
    attack = PGD(ThreatModel(eps=eps), step_size=eps / 2, steps=2)
    for _ in range(8):
        for rows in torch.randperm(len(train), generator=draw).split(64):
            x, y = train.images[rows] / 255, train.labels[rows]
            x = attack(model, x, y, generator=draw) if eps else x
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
    return model.eval()


class Around(nn.Module):
    """A network with something in front of it or behind it."""

    def __init__(
        self, net: nn.Module, *, before: Callable[[Tensor], Tensor] | None, after: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


def before(net: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
    return Around(net, before=fn, after=None)


def after(net: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
    return Around(net, before=None, after=fn)


def checks(model: nn.Module, data: tuple[Tensor, Tensor], threat: ThreatModel = LINF) -> list[str]:
    return [flag.check for flag in check_model(model, [data], threat=threat)]


@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel(eps=0.3)])
def test_honest_networks_raise_no_flag(standard, adversarial, digits, threat):
    for model in (standard, adversarial):
        assert check_model(model, [digits], threat=threat) == ()


@pytest.mark.parametrize("name", [name for name in ZOO if name != "tuple_output"] + ["vit", "swin"])
def test_networks_of_many_kinds_raise_no_flag_even_untrained(name):
    model = build(name).eval()
    x, _ = images(24, size=FOREIGN_IMAGE if name in FOREIGN else (3, 8, 8))
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    assert check_model(model, [(x, y)], threat=ThreatModel(eps=0.03)) == ()


def test_a_linear_model_raises_no_flag():
    x, _ = images(32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    y = model(x).argmax(dim=1)
    assert check_model(model, [(x, y)], threat=ThreatModel(eps=0.02)) == ()


def test_log_probabilities_raise_no_flag(standard, digits):
    assert checks(after(standard, lambda z: z.log_softmax(dim=1)), digits) == []


def optimised(x: Tensor) -> Tensor:
    """Moves an image towards black by gradient descent, as defences that optimise at test time do."""
    with torch.enable_grad():
        image = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(image.square().sum(), image)
    return x - 0.005 * gradient


MASKS: dict[str, tuple[Callable[[nn.Module], nn.Module], set[str]]] = {
    "quantised input": (
        lambda net: before(net, lambda x: (8 * x).round() / 8),
        {"zero-gradients", "unbounded-eps"},
    ),
    "saturated logits": (lambda net: after(net, lambda z: 1e4 * z), {"zero-gradients"}),
    "noise": (lambda net: before(net, lambda x: x + 0.003 * torch.randn_like(x)), {"randomised-forward"}),
    "dropout": (lambda net: after(net, lambda z: F.dropout(z, 0.01, training=True)), {"randomised-forward"}),
    "probabilities": (lambda net: after(net, lambda z: z.softmax(dim=1)), {"probabilities"}),
    "batch mean": (lambda net: after(net, lambda z: z - 0.1 * z.mean(dim=0)), {"batch-dependent"}),
    "steep waves": (lambda net: before(net, lambda x: x + 0.001 * torch.sin(1e5 * x)), {"gradient-misleads"}),
    "detached": (lambda net: before(net, lambda x: x.detach()), {"no-gradient"}),
    "numpy": (lambda net: before(net, lambda x: torch.from_numpy(x.detach().numpy())), {"no-gradient"}),
    "test-time optimisation": (lambda net: before(net, optimised), {"autograd-in-forward"}),
    "square root at zero": (lambda net: before(net, lambda x: x.sqrt().square()), {"non-finite-gradients"}),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_network_that_masks_gradients_raises_its_flag_and_no_other(standard, digits, mask):
    wrap, expected = MASKS[mask]
    assert set(checks(wrap(standard), digits)) == expected


@pytest.mark.parametrize("mask", ["quantised input", "saturated logits", "steep waves", "noise", "detached"])
def test_so_it_does_when_adversarially_trained_and_under_l2(adversarial, digits, mask):
    wrap, expected = MASKS[mask]
    assert expected <= set(checks(wrap(adversarial), digits, L2))


def test_a_random_start_does_not_hide_that_an_unbounded_attack_goes_nowhere(standard, digits):
    found = check_model(MASKS["quantised input"][0](standard), [digits], threat=LINF)
    assert found[-1].seen.startswith("16 of 16 images stand although the attack may change every pixel to any value")


def test_one_step_that_beats_many_is_seen(standard, digits):
    rough = before(standard, lambda x: x + 0.05 * torch.sin(1000 * x))
    flags = {flag.check: flag for flag in check_model(rough, [digits], threat=LINF)}
    assert flags.keys() <= {"one-step-beats-many", "gradient-misleads", "unbounded-eps"}
    assert "stand under one step of eps = 0.1" in flags["one-step-beats-many"].seen


def test_nan_logits_of_some_images_are_counted(standard, digits):
    x, _ = digits
    bright = x.flatten(1).mean(dim=1).quantile(0.7)  # 19 images are brighter

    def spoil(x: Tensor) -> Tensor:
        return torch.where((x.flatten(1).mean(dim=1) > bright)[:, None, None, None], torch.nan, x)

    found = check_model(before(standard, spoil), [digits], threat=LINF)
    assert [flag.check for flag in found if flag.check != "unbounded-eps"] == ["non-finite-logits"]
    assert found[0].seen == "19 of 64 clean images have NaN or infinite logits"


class Stubborn(nn.Module):
    """Keeps its batch norm and dropout in train mode whatever it is told."""

    def __init__(self, net: nn.Module, *kept: str) -> None:
        super().__init__()
        self.net, self.kept = net, kept

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(mode)
        for name in self.kept:
            self.get_submodule(name).training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_batch_norm_that_stays_in_train_mode_is_named(standard, digits):
    found = check_model(Stubborn(standard, "net.layer1.0.bn"), [digits], threat=LINF)
    assert [flag.check for flag in found] == ["train-mode", "batch-dependent"]
    assert found[0].seen == "1 of 25 modules in train mode after eval(): net.layer1.0.bn"


def test_dropout_that_stays_in_train_mode_is_named_and_random(standard, digits):
    model = Stubborn(nn.Sequential(standard, nn.Dropout(0.02)), "net.1")
    assert checks(model, digits)[:2] == ["train-mode", "randomised-forward"]
    torch.rand(3)
    assert check_model(model, [digits], threat=LINF) == check_model(model, [digits], threat=LINF)


def test_batch_norm_without_running_statistics_depends_on_the_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    model.append(nn.Linear(4 * 36, 4))
    x, y = images(32)
    assert "batch-dependent" in checks(model, (x, y))
    assert "batch-dependent" in checks(model, (x[:1], y[:1]))


def test_batch_norm_behind_pooling_which_refuses_a_single_image_is_seen_too():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3, track_running_stats=False))
    model.append(nn.Linear(3, 4))
    assert "batch-dependent" in checks(model, images(32))


def test_a_model_handed_over_in_train_mode_is_no_flag(standard, digits):
    standard.train()
    try:
        assert checks(standard, digits) == []
    finally:
        standard.eval()


def test_a_few_zero_gradients_are_no_flag_and_more_are(standard, digits):
    x, _ = digits
    darkness = x.flatten(1).mean(dim=1)

    def saturate(share: float) -> nn.Module:
        limit = darkness.quantile(share)

        def scale(x: Tensor) -> Tensor:  # the darkest images get no gradient
            dark = (x.flatten(1).mean(dim=1) <= limit)[:, None, None, None]
            return torch.where(dark, x.detach(), x)

        return before(standard, scale)

    assert "zero-gradients" not in checks(saturate(0.03), digits)
    assert "zero-gradients" in checks(saturate(0.12), digits)


def test_one_image_is_enough(standard, digits):
    x, y = digits
    with torch.no_grad():
        first = int((standard(x).argmax(dim=1) == y).nonzero()[0])
    one = x[first : first + 1], y[first : first + 1]
    assert checks(standard, one) == []
    assert checks(MASKS["quantised input"][0](standard), one) == ["zero-gradients"]
    assert checks(after(standard, lambda z: z.softmax(dim=1)), one) == ["probabilities"]


def test_a_model_that_errs_on_everything_raises_no_flag(standard, digits):
    x, _ = digits
    with torch.no_grad():
        wrong = (standard(x).argmax(dim=1) + 1) % 10
    assert checks(standard, (x, wrong)) == []


def test_eps_zero_allows_no_attack_and_raises_no_flag(standard, digits):
    assert checks(standard, digits, ThreatModel(eps=0.0)) == []


def test_only_the_first_samples_are_looked_at_in_parts_no_larger_than_a_batch(standard, digits):
    x, y = digits
    sizes: list[int] = []
    taken: list[int] = []

    def batches():
        for number, rows in enumerate(torch.arange(64).split(12)):
            taken.append(number)
            yield Batch(x[rows], y[rows])

    with standard.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
        check_model(standard, batches(), threat=LINF, samples=30)
    assert taken == [0, 1, 2]
    assert max(sizes) <= 16


def test_the_checks_show_64_images_to_the_model_less_than_2000_times_and_ask_for_no_gradient_of_weights(
    standard, digits
):
    shown, asked = [], []

    def watch(model: nn.Module, args: tuple[Tensor, ...]) -> None:
        shown.append(len(args[0]))
        asked.extend(parameter.requires_grad for parameter in model.parameters())

    with standard.register_forward_pre_hook(watch):
        check_model(standard, [digits], threat=LINF)
    assert 1000 < sum(shown) < 2000
    assert not any(asked)


@pytest.mark.parametrize("name", ["nested", "normed", "dropouts", "in_place", "attention", "noisy", "counting"])
def test_the_model_is_left_as_found(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        check_model(model, [images(4)], threat=LINF)


def test_the_same_seed_gives_the_same_flags(standard, digits):
    model = before(standard, lambda x: x + 0.002 * torch.sin(1e4 * x))
    assert check_model(model, [digits], threat=LINF, seed=3) == check_model(model, [digits], threat=LINF, seed=3)


def test_a_flag_is_one_line_with_numbers(standard, digits):
    (flag,) = check_model(after(standard, lambda z: 1e4 * z), [digits], threat=LINF)
    line = str(flag)
    assert line.startswith("zero-gradients: the gradient of the cross-entropy is exactly zero for ")
    assert "allowed 5%" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("batches", "samples", "message"),
    [
        ([], 64, "no images to check the model on: the batches are empty"),
        ([images(2)], 0, "samples is 0; the checks need at least 1 image"),
        ([(2 * images(2)[0], images(2)[1])], 64, "normalisation"),
    ],
)
def test_mistakes_are_named(batches, samples, message):
    with pytest.raises(InputError, match=message):
        check_model(build("nested"), batches, threat=LINF, samples=samples)
