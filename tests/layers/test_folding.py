"""Folded batch norm: the same function up to rounding, only where it is safe, and nothing is left behind."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from as_found import left_as_found
from toughen import models
from toughen.attacks import PGD, FeatureShift
from toughen.errors import InputError
from toughen.layers import ModelView, norms_folded
from toughen.types import ThreatModel
from zoo import ZOO, build, images

X, Y = images(4)
THREAT = ThreatModel(eps=0.05)


def lived_in(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics, scale and shift as training would, in eval mode."""
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3, generator=draw)
                nn.init.normal_(module.bias, generator=draw)
    return model.eval()


def norm_calls(model: nn.Module, run: Callable[[], object]) -> int:
    """Count how often batch norm is computed by itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::batch_norm")


def forward(model: nn.Module, x: Tensor, *, folded: bool) -> Tensor:
    if not folded:
        return model(x)
    with norms_folded(model, x):
        return model(x)


def outcome(model: nn.Module, *, folded: bool) -> tuple[Tensor, ...]:
    """Logits, and gradients of the image and of every parameter, where there is one."""
    x = X.clone().requires_grad_(True)
    logits = forward(model, x, folded=folded)
    wanted = [x, *model.parameters()]
    gradients = torch.autograd.grad(logits.square().sum(), wanted, allow_unused=True)
    return logits.detach(), *(torch.zeros(()) if g is None else g for g in gradients)


@pytest.mark.parametrize("name", ZOO)
def test_logits_and_all_gradients_are_the_same_up_to_rounding(name):
    model = lived_in(build(name))
    for plain, folded in zip(outcome(model, folded=False), outcome(model, folded=True), strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_the_model_is_left_as_found(name):
    model = build(name).eval()
    with left_as_found(model):
        with pytest.raises(ZeroDivisionError), norms_folded(model, X):
            raise ZeroDivisionError
        with norms_folded(model, X):
            model(X)


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("vgg19", 0), ("preact_resnet18", 9), ("wrn34_10", 15)],
)
def test_every_norm_behind_a_convolution_is_folded_and_no_other(name, left):
    model = models.create(name, num_classes=10, seed=0, width=4 if name != "wrn34_10" else 1)
    model.eval()

    def run() -> None:
        with norms_folded(model, X):
            model(X)

    run()  # the first time looks for them
    assert norm_calls(model, run) == left


class Chain(nn.Module):
    """A convolution and a batch norm, with what may stand in the way of folding them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5) if kind == "dropout" else nn.Identity()
        self.bn = Rectified(3) if kind == "subclass" else nn.BatchNorm2d(3, track_running_stats=kind != "untracked")
        if kind == "shared":
            self.other.weight = self.conv.weight
        if kind == "normalised":
            torch.nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.kind == "rectified in place":
            out = self.relu(out)
        normed = self.bn(self.dropout(out))
        if self.kind == "skip":
            normed = normed + out
        if self.kind == "detached skip":
            normed = normed + out.detach()
        if self.kind == "gate":
            normed = normed * (out > 0)
        if self.kind == "weight elsewhere":
            normed = nn.functional.conv2d(normed, self.conv.weight)
        if self.kind == "twice":
            normed = self.bn(self.conv(normed))
        if self.kind == "between":
            normed = self.bn(out.relu())
        return self.other(normed).flatten(1)


class Rectified(nn.BatchNorm2d):
    """As timm's norms, with the activation inside."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    "kind",
    [
        *("skip", "detached skip", "gate", "weight elsewhere", "twice", "between", "rectified in place", "shared"),
        *("subclass", "untracked", "normalised", "hooked", "hooked between", "train"),
    ],
)
def test_where_folding_would_change_the_function_nothing_is_folded(kind):
    model = lived_in(Chain(kind))
    seen: list[Tensor] = []
    if kind.startswith("hooked"):
        hooked = model.conv if kind == "hooked" else model.dropout
        hooked.register_forward_hook(lambda _m, _x, out: seen.append(out))
    model.train(kind == "train")
    plain = model(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)
    assert norm_calls(model, lambda: outcome(model, folded=True)) >= 1
    assert all(torch.equal(out, seen[0]) for out in seen if len(out) == len(X))


def test_dropout_between_them_is_in_the_way_only_where_it_drops():
    model = lived_in(Chain("dropout"))
    with norms_folded(model, X):
        assert norm_calls(model, lambda: model(X)) == 0
    model.dropout.train()
    torch.manual_seed(0)
    plain = model(X)
    with norms_folded(model, X):
        torch.manual_seed(0)
        assert torch.equal(model(X), plain)


@pytest.mark.parametrize("channels", [3, 5])
def test_batch_norm_over_the_positions_of_a_sequence_is_not_folded(channels):
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, channels), nn.BatchNorm1d(3), nn.Flatten())
    plain = lived_in(model)(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)


def test_an_output_that_is_returned_although_a_norm_takes_it_stays():
    class Returns(Chain):
        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            self.bn(out)
            return out.flatten(1)

    model = lived_in(Returns("plain"))
    plain = model(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)


def test_statistics_that_were_taken_away_later_are_not_folded():
    model = lived_in(Chain("plain"))
    with norms_folded(model, X):
        model(X)
    model.bn.running_mean = model.bn.running_var = None
    plain = model(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)


def test_a_forward_of_the_users_own_stays_where_it_is():
    model = lived_in(Chain("plain"))
    model.bn.forward = torch.neg
    plain = model(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)
    assert model.bn.forward is torch.neg


def test_weights_of_half_precision_stay_so_when_the_norm_has_more():
    model = lived_in(nn.Sequential(nn.Conv2d(3, 3, 3).bfloat16(), nn.BatchNorm2d(3), nn.Flatten()))
    plain = model(X.bfloat16())
    with norms_folded(model, X.bfloat16()):
        assert model[0].weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(X.bfloat16()), plain, rtol=0.05, atol=0.05)


def test_a_model_is_let_go_when_nobody_else_has_it():
    model = lived_in(Chain("plain"))
    with norms_folded(model, X):
        model(X)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


def test_a_chain_without_any_of_these_is_folded():
    model = lived_in(Chain("plain"))
    with norms_folded(model, X):
        model(X)
        assert norm_calls(model, lambda: model(X)) == 0


def test_modules_that_were_exchanged_are_looked_at_again():
    model = lived_in(Chain("plain"))
    with norms_folded(model, X):
        model(X)
    model.conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    plain = model(X)
    with norms_folded(model, X):
        assert torch.equal(model(X), plain)


def test_weights_that_moved_are_folded_anew():
    model = lived_in(Chain("plain"))
    with norms_folded(model, X):
        model(X)
    with torch.no_grad():
        model.conv.weight.mul_(3)
        model.bn.running_mean.add_(1)
    with norms_folded(model, X):
        torch.testing.assert_close(model(X), lived_in_output(model), rtol=1e-4, atol=1e-4)


def lived_in_output(model: Chain) -> Tensor:
    return model.other(model.bn(nn.functional.conv2d(X, model.conv.weight, model.conv.bias, padding=1))).flatten(1)


def test_under_autocast_the_folded_weights_are_cast_once():
    model = lived_in(Chain("plain"))
    with torch.autocast("cpu", torch.bfloat16), norms_folded(model, X):
        assert model.conv.weight.dtype == model.conv.bias.dtype == torch.bfloat16
        found = model(X)
    torch.testing.assert_close(found.float(), model(X), rtol=0.05, atol=0.05)
    assert model.conv.weight.dtype == torch.float32


def test_a_layer_that_is_kept_shows_its_own_output():
    model = lived_in(build("resnet18"))
    plain = ModelView(model).features(X, ["layer2.0.conv1"]).values["layer2.0.conv1"]
    with norms_folded(model, X, keep=["layer2.0.conv1"]):
        found = ModelView(model).features(X, ["layer2.0.conv1"]).values["layer2.0.conv1"]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_a_module_that_passes_on_the_output_of_its_layer_is_kept_or_known_as_folded_with_it():
    model = lived_in(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3)), nn.BatchNorm2d(3), nn.Flatten()))
    plain = ModelView(model).features(X, ["0"]).values["0"]
    with norms_folded(model, X, keep=["0"]):
        assert torch.equal(ModelView(model).features(X, ["0"]).values["0"], plain)
    with norms_folded(model, X), pytest.raises(InputError, match="layer '0' is folded"):
        ModelView(model).features(X, ["0"])
    assert torch.equal(ModelView(model).features(X, ["0"]).values["0"], plain)


def test_a_goal_that_looks_at_a_folded_layer_without_naming_it_is_told():
    class Unnamed:
        def bind(self, view, x, y):
            return lambda x_adv: view.features(x_adv, ["conv"]).values["conv"].flatten(1).sum(dim=1)

    model = lived_in(Chain("plain"))
    with pytest.raises(InputError, match=r"'conv' is folded .* names them in its attribute 'layers'"):
        PGD(THREAT, step_size=0.01, steps=1)(model, X, Y, goal=Unnamed())


@pytest.mark.parametrize("goal", [None, FeatureShift(layers=("layer2.0.conv1",))])
def test_an_attack_finds_the_same_perturbation_up_to_rounding(goal):
    model = lived_in(build("resnet18"))
    found = [
        PGD(THREAT, step_size=0.0125, steps=5, fold_norms=folded)(
            model, X, Y, goal=goal, generator=torch.Generator().manual_seed(0)
        )
        for folded in (False, True)
    ]
    # where a gradient is rounding noise its sign is anyone's guess
    assert torch.isclose(*found).float().mean() > 0.99


def test_fewer_bytes_are_kept_for_the_way_back():
    model = lived_in(build("resnet18")).requires_grad_(False)
    images = torch.rand(8, 3, 32, 32)  # large enough for activations to outweigh the weights

    def kept(*, folded: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = forward(model, images.clone().requires_grad_(True), folded=folded)
        assert logits.requires_grad
        return sum(sizes.values())

    kept(folded=True)  # the first time looks for the norms
    assert kept(folded=True) < 0.75 * kept(folded=False)
