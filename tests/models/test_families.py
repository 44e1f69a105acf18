"""The families for small images: published sizes, the numbering of layers, and the names in public checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toughen.errors import InputError
from toughen.layers import map_layers
from toughen.models import create

SILU = ["wrn28_10_silu", "wrn34_10_silu", "wrn70_16_silu"]
FAMILIES = ["resnet50", "wrn28_10", "wrn34_10", "wrn70_16", *SILU, "densenet121", "vgg19", "rawrn70_16"]


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights and buffers; the model takes no memory."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in create(name).state_dict().items()}


def layer_names(name: str, *, exclude: tuple[str, ...] = ()) -> list[str]:
    return [layer.name for layer in map_layers(create(name, width=4), torch.rand(1, 3, 8, 8), exclude=exclude)]


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("resnet50", None, 23_520_842),
        ("wrn28_10", None, 36_479_194),
        ("wrn34_10", None, 46_160_474),
        ("wrn70_16", None, 266_796_506),
        ("wrn28_10", 32, 1_467_610),  # WRN-28-2
        ("wrn34_10", 320, 184_531_674),  # WRN-34-20
        ("wrn28_10_silu", None, 36_479_194),
        ("wrn34_10_silu", None, 46_160_474),
        ("wrn70_16_silu", None, 266_796_506),
        ("densenet121", None, 6_956_298),
        ("densenet121", 24, 1_000_618),  # growth rate 12
        ("vgg19", None, 20_040_522),
        ("rawrn70_16", None, 267_240_802),
    ],
)
def test_the_published_widths_give_the_published_number_of_parameters(
    name: str, width: int | None, parameters: int
) -> None:
    with torch.device("meta"):
        model = create(name, width=width)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "convolutions", "classifier", "numbered"),
    [
        (
            "resnet50",
            53,
            "linear",
            {
                0: "conv1",
                3: "layer1.0.conv3",
                4: "layer1.0.shortcut.0",
                34: "layer3.3.conv1",
                41: "layer3.5.conv2",
                48: "layer4.1.conv2",
                52: "layer4.2.conv3",
            },
        ),
        (
            "densenet121",
            120,
            "linear",
            {
                0: "conv1",
                1: "dense1.0.conv1",
                2: "dense1.0.conv2",
                13: "trans1.conv",
                14: "dense2.0.conv1",
                38: "trans2.conv",
                39: "dense3.0.conv1",
                88: "dense4.0.conv1",
                119: "dense4.15.conv2",
            },
        ),
        ("vgg19", 16, "classifier", {0: "features.0", 2: "features.7", 15: "features.49"}),
        ("wrn28_10", 28, "fc", {0: "conv1", 3: "block1.layer.0.convShortcut", 27: "block3.layer.3.conv2"}),
        ("wrn34_10", 34, "fc", {1: "block1.layer.0.conv1", 2: "block1.layer.0.conv2", 33: "block3.layer.4.conv2"}),
        ("wrn70_16", 70, "fc", {69: "block3.layer.10.conv2"}),
        ("wrn28_10_silu", 28, "logits", {0: "init_conv", 3: "layer.0.block.0.shortcut", 27: "layer.2.block.3.conv_1"}),
        ("wrn34_10_silu", 34, "logits", {1: "layer.0.block.0.conv_0", 33: "layer.2.block.4.conv_1"}),
        ("wrn70_16_silu", 70, "logits", {69: "layer.2.block.10.conv_1"}),
        (
            "rawrn70_16",
            288,
            "logits",
            {3: "layer.0.block.0.se.fc1", 4: "layer.0.block.0.se.fc2", 5: "layer.0.block.0.shortcut"},
        ),
    ],
)
def test_layers_are_numbered_in_order_of_execution(
    name: str, convolutions: int, classifier: str, numbered: dict[int, str]
) -> None:
    names = layer_names(name)
    assert len(names) == convolutions + 1
    assert names[-1] == classifier
    assert {index: names[index] for index in numbered} == numbered


def test_indices_1_14_39_and_88_of_densenet121_are_the_1x1_bottlenecks_that_open_its_blocks() -> None:
    model = create("densenet121", width=4)
    names = layer_names("densenet121")
    opening = [model.get_submodule(names[index]) for index in (1, 14, 39, 88)]
    assert [m.kernel_size for m in opening if isinstance(m, nn.Conv2d)] == [(1, 1)] * 4
    assert [names[index].split(".")[1] for index in (1, 14, 39, 88)] == ["0"] * 4


def test_without_squeeze_and_excitation_rawrn_has_the_layers_of_its_wide_resnet() -> None:
    names = layer_names("rawrn70_16", exclude=("*.se.*",))
    assert len(names) == 1 + 2 * (30 + 31 + 10) + 3 + 1
    assert [name for name in names if ".se." in name] == []
    assert [name for name in names if "shortcut" in name] == [f"layer.{i}.block.0.shortcut" for i in range(3)]


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        (
            "resnet50",
            {
                "bn1.running_mean": (64,),
                "layer1.0.conv1.weight": (64, 64, 1, 1),
                "layer1.0.shortcut.0.weight": (256, 64, 1, 1),
                "layer1.0.shortcut.1.bias": (256,),
                "layer2.0.conv2.weight": (128, 128, 3, 3),
                "layer4.2.bn3.weight": (2048,),
                "linear.weight": (10, 2048),
            },
        ),
        (
            "wrn34_10",
            {
                "conv1.weight": (16, 3, 3, 3),
                "block1.layer.0.bn1.weight": (16,),
                "block1.layer.0.conv1.weight": (160, 16, 3, 3),
                "block1.layer.0.bn2.running_var": (160,),
                "block2.layer.0.convShortcut.weight": (320, 160, 1, 1),
                "bn1.bias": (640,),
                "fc.weight": (10, 640),
            },
        ),
        (
            "wrn28_10_silu",
            {
                "init_conv.weight": (16, 3, 3, 3),
                "layer.0.block.0.batchnorm_0.weight": (16,),
                "layer.0.block.0.shortcut.weight": (160, 16, 1, 1),
                "layer.1.block.3.batchnorm_1.running_mean": (320,),
                "layer.2.block.0.conv_0.weight": (640, 320, 3, 3),
                "layer.2.block.3.conv_1.weight": (640, 640, 3, 3),
                "batchnorm.weight": (640,),
                "logits.bias": (10,),
            },
        ),
        (
            "rawrn70_16",
            {
                "init_conv.weight": (96, 3, 3, 3),
                "layer.0.block.0.se.fc1.weight": (54, 216, 1, 1),
                "layer.0.block.0.se.fc1.bias": (54,),
                "layer.1.block.30.se.fc2.weight": (432, 108, 1, 1),
                "layer.2.block.9.conv_1.weight": (864, 864, 3, 3),
                "logits.weight": (10, 864),
            },
        ),
        (
            "densenet121",
            {
                "conv1.weight": (64, 3, 3, 3),
                "dense1.0.bn1.weight": (64,),
                "dense1.5.conv1.weight": (128, 224, 1, 1),
                "dense1.5.conv2.weight": (32, 128, 3, 3),
                "trans1.bn.running_mean": (256,),
                "trans1.conv.weight": (128, 256, 1, 1),
                "bn.weight": (1024,),
                "linear.weight": (10, 1024),
            },
        ),
        (
            "vgg19",
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.0.bias": (64,),
                "features.1.running_mean": (64,),
                "features.49.weight": (512, 512, 3, 3),
                "features.50.weight": (512,),
                "classifier.weight": (10, 512),
            },
        ),
    ],
)
def test_weights_have_the_names_and_shapes_of_public_checkpoints(
    name: str, entries: dict[str, tuple[int, ...]]
) -> None:
    found = shapes(name)
    assert {key: found.get(key) for key in entries} == entries


# Logits of the public code for ``filled`` weights: kuangliu/pytorch-cifar 49b7aa9 with an eighth of its channels,
# yaodongyu/TRADES 6e8e11b at WRN-28-2, RobustBench 78fcc9e (dm_wide_resnet at WRN-28-2, robustarch_wide_resnet at 9).
PUBLIC_LOGITS = {
    ("resnet50", 8): [0.197535711, -0.058885296, 0.045702534],
    ("wrn28_10", 32): [-0.469952053, -0.189665052, -0.191010283],
    ("wrn28_10_silu", 32): [-0.057463611, -0.077882094, -0.060434489],
    ("densenet121", 8): [0.030014359, 0.09769847, 0.061731993],
    ("vgg19", 8): [0.339822235, -0.368260602, -0.005173083],
    ("rawrn70_16", 9): [580.402397836, -909.211814732, 1155.565175106],
}


def scattered(*shape: int, start: int = 0) -> Tensor:
    """Numbers in [-1, 1] that are the same everywhere: quadratic residues."""
    k = torch.arange(torch.Size(shape).numel())
    return (((7 * k * k + 31 * k + start) % 1009).double() / 504 - 1).view(shape)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Give every weight and statistic a value that follows from its name's rank, shape and place."""
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    for rank, key in enumerate(sorted(key for key in state if not key.startswith("normalize."))):
        value = state[key]
        wave = scattered(*value.shape, start=rank)
        if value.dim() > 1:
            value.copy_(wave * 2 / value[0].numel() ** 0.5)
        else:
            value.copy_(wave / 4 + (1 if key.endswith(("weight", "running_var")) else 0))
    return model


@pytest.mark.parametrize(("name", "width"), PUBLIC_LOGITS)
def test_the_same_weights_give_the_logits_of_the_public_code(name: str, width: int) -> None:
    model = filled(create(name, width=width, mean=(0, 0, 0), std=(1, 1, 1)).double()).eval()
    x = scattered(2, 3, 32, 32, start=5) / 2 + 0.5
    with torch.no_grad():
        found = model(x)[0, :3]
    torch.testing.assert_close(found, torch.tensor(PUBLIC_LOGITS[name, width]).double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_normalised_first(name: str) -> None:
    with torch.device("meta"):
        assert next(iter(dict(create(name, width=4).named_children()))) == "normalize"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", [32, 11])
def test_logits_are_finite_and_every_pixel_counts(name: str, side: int) -> None:
    model = create(name, width=4, seed=0).eval()
    x = torch.rand(2, 3, side, side, requires_grad=True)
    logits = model(x)
    assert logits.isfinite().all()
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.ne(0).any(dim=(0, 1)).all()


class Activations(TorchFunctionMode):
    """Notes which activation functions run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if any(kind in name for kind in ("relu", "silu", "sigmoid")):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("wrn34_10", {"relu"}),
        ("wrn34_10_silu", {"silu"}),
        ("rawrn70_16", {"silu", "relu", "sigmoid"}),  # the last two within squeeze-and-excitation
    ],
)
def test_the_silu_form_runs_no_relu(name: str, activations: set[str]) -> None:
    model = create(name, width=4)
    with Activations() as running:
        model(torch.rand(2, 3, 8, 8))
    assert running.seen == activations


@pytest.mark.parametrize(("name", "momentum"), [("wrn34_10", 0.1), ("wrn34_10_silu", 0.01), ("rawrn70_16", 0.01)])
def test_running_statistics_follow_the_newest_batch_as_the_publication_has_it(name: str, momentum: float) -> None:
    with torch.device("meta"):
        model = create(name, width=4)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


@pytest.mark.parametrize("name", ["wrn28_10_silu", "rawrn70_16"])
@pytest.mark.parametrize(("side", "first_row"), [(8, 0), (9, -1)])
def test_stride_2_pads_the_end_of_an_even_side_and_both_ends_of_an_odd_one(
    name: str, side: int, first_row: int
) -> None:
    block = create(name, width=4, seed=0).get_submodule("layer.1.block.0")
    seen: list[Tensor] = []
    convolution = block.get_submodule("conv_0")
    convolution.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x = torch.rand(1, 4, side, side)
    block.eval()(x)
    activated = F.silu(block.get_submodule("batchnorm_0")(x))
    around = F.pad(activated, (1, 1, 1, 1))[:, :, first_row + 1 :, first_row + 1 :]
    weight = convolution.get_parameter("weight")
    torch.testing.assert_close(seen[0], F.conv2d(around, weight, stride=2))


def test_a_fresh_densenet_keeps_the_size_of_its_features() -> None:
    model = create("densenet121", width=16, seed=0).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 8, 8)).abs().max() < 10


def test_an_odd_width_of_a_densenet_is_refused_with_an_even_one_named() -> None:
    with pytest.raises(InputError, match="width is 5; densenet121 needs an even one, twice its growth rate: try 6"):
        create("densenet121", width=5)
