import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.models import MODELS, Normalize, create

RESNET18_CONVOLUTIONS = [
    "conv1",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer1.1.conv1",
    "layer1.1.conv2",
    "layer2.0.conv1",
    "layer2.0.conv2",
    "layer2.0.shortcut.0",
    "layer2.1.conv1",
    "layer2.1.conv2",
    "layer3.0.conv1",
    "layer3.0.conv2",
    "layer3.0.shortcut.0",
    "layer3.1.conv1",
    "layer3.1.conv2",
    "layer4.0.conv1",
    "layer4.0.conv2",
    "layer4.0.shortcut.0",
    "layer4.1.conv1",
    "layer4.1.conv2",
]


def executed_convolutions(model: nn.Module, x: Tensor) -> list[str]:
    order: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(x)
    return order


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_the_20_convolutions_of_a_resnet18_run_in_the_papers_order(name: str) -> None:
    model = create(name, width=4)
    assert executed_convolutions(model, torch.rand(2, 3, 16, 16)) == RESNET18_CONVOLUTIONS


def test_the_six_convolutions_of_the_small_cnn_have_the_promised_widths_and_strides() -> None:
    model = create("small_cnn", width=5, in_channels=1)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [5, 5, 10, 10, 20, 20]
    assert [c.stride[0] for c in convolutions] == [1, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_173_962), ("preact_resnet18", 11_172_170), ("small_cnn", 72_954)]
)
def test_default_widths_give_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in create(name).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (4, 9, 17)])
def test_every_model_takes_any_channels_and_image_size(name: str, channels: int, height: int, width: int) -> None:
    model = create(name, num_classes=7, width=4, in_channels=channels)
    assert model(torch.rand(2, channels, height, width)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # without dead units, of which so narrow a network has some
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    model = create(name, width=4, seed=0)
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_never_changed_in_place(name: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    before = x.clone()
    create(name, width=4)(x)
    assert torch.equal(x, before)


def test_a_projection_of_the_preact_block_takes_the_activated_input() -> None:
    model = create("preact_resnet18", width=4, seed=0)
    seen: dict[str, Tensor] = {}
    block = model.get_submodule("layer2.0")
    for part in ("conv1", "shortcut"):
        block.get_submodule(part).register_forward_pre_hook(lambda _, args, p=part: seen.update({p: args[0]}))
    model(torch.rand(2, 3, 8, 8))
    assert seen["conv1"] is seen["shortcut"]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    first, again, other = (
        torch.cat([p.flatten() for p in create(name, width=4, seed=seed).parameters()]) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_seed_leaves_the_global_random_state_alone_and_ignores_it() -> None:
    first = create("small_cnn", seed=0).state_dict()
    torch.rand(5)
    before = torch.get_rng_state()
    second = create("small_cnn", seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_a_seed_the_weights_come_from_the_global_state() -> None:
    torch.manual_seed(1)
    first = create("small_cnn").state_dict()
    torch.manual_seed(1)
    second = create("small_cnn").state_dict()
    third = create("small_cnn").state_dict()
    assert torch.equal(first["layer1.0.conv.weight"], second["layer1.0.conv.weight"])
    assert not torch.equal(first["layer1.0.conv.weight"], third["layer1.0.conv.weight"])


def test_images_are_normalised_inside_by_statistics_that_the_checkpoint_holds() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    given = create("small_cnn", mean=mean, std=std, seed=0).eval()
    default = create("small_cnn", seed=0).eval()
    x = torch.rand(2, 3, 8, 8)
    assert not torch.allclose(given(x), default(x))
    default.load_state_dict(given.state_dict())
    assert torch.equal(given(x), default(x))
    # Plain arithmetic, one channel at a time.
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(given.get_submodule("normalize")(x), expected)


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [(3, [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]), (1, [0.5], [0.5]), (4, [0.5] * 4, [0.5] * 4)],
)
def test_default_statistics_are_cifar10s_for_three_channels_and_one_half_otherwise(
    channels: int, mean: list[float], std: list[float]
) -> None:
    state = create("small_cnn", in_channels=channels).state_dict()
    assert state["normalize.mean"].flatten().tolist() == pytest.approx(mean)
    assert state["normalize.std"].flatten().tolist() == pytest.approx(std)


def test_images_with_other_channels_than_the_models_are_refused_not_broadcast() -> None:
    with pytest.raises(InputError, match="images have 1 channels, the model was built for 3"):
        create("small_cnn")(torch.rand(2, 1, 8, 8))


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown model 'resnet81'; did you mean 'resnet18'"):
        create("resnet81")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1; a classifier needs at least 2"),
        ({"width": 0}, "width is 0; the first stage needs at least 1 channel"),
        ({"in_channels": 0}, "in_channels is 0; images have at least 1 channel"),
        ({"mean": (0.5,)}, "mean has 1 numbers; in_channels=3 needs 3"),
        ({"std": (0.5, 0.0, 0.5)}, r"std \(0.5, 0.0, 0.5\) finite and above 0"),
    ],
)
def test_impossible_sizes_and_statistics_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create("small_cnn", **arguments)  # type: ignore[arg-type]


def test_normalize_alone_refuses_statistics_of_different_lengths() -> None:
    with pytest.raises(InputError, match="one number per channel"):
        Normalize((0.5,), (0.5, 0.5))
