import json
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.models import Normalize, check_spec, create, is_spec, model_names

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def images(size: int, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    layer = model.get_submodule("normalize")
    assert isinstance(layer, Normalize)
    mean, std = ([round(value, 6) for value in values.flatten().tolist()] for values in (layer.mean, layer.std))
    return tuple(mean), tuple(std)


# -- timm and torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "own"),
    [("resnet18", 32, IMAGENET), ("test_convnext", 64, HALF), ("vit_tiny_patch16_224", 32, HALF)],
)
def test_timms_network_with_its_weights_gives_timms_logits(
    tmp_path: Path, name: str, size: int, own: tuple[Any, Any]
) -> None:
    import timm

    sized = {"img_size": size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=7, **sized).eval()
    torch.save(network.state_dict(), tmp_path / "a.pt")
    cifar = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    model = create(
        f"timm/{name}", num_classes=7, image_size=size, weights=tmp_path / "a.pt", data_statistics=cifar
    ).eval()
    assert statistics(model) == own
    assert torch.equal(model(images(size)), network(normalised(images(size), *own)))


def test_torchvisions_network_with_its_weights_gives_its_logits(tmp_path: Path) -> None:
    from torchvision.models import densenet121

    network = densenet121(num_classes=5).eval()
    # torchvision's own files have the names of before
    old = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))([12])\.(.*)$")
    torch.save({old.sub(r"\1.\2.\3", name): v for name, v in network.state_dict().items()}, tmp_path / "a.pt")
    assert any(".norm.1." in name for name in torch.load(tmp_path / "a.pt"))
    model = create("torchvision/densenet121", num_classes=5, weights=tmp_path / "a.pt").eval()
    assert torch.equal(model(images(32)), network(normalised(images(32), *IMAGENET)))


def test_a_grey_network_of_timm_gets_the_average_of_the_statistics() -> None:
    model = create("timm/test_resnet", in_channels=1, num_classes=4, image_size=32)
    assert model(images(32, channels=1)).shape == (2, 4)
    assert statistics(model) == ((0.449,), (0.226,))


def test_statistics_come_from_the_caller_then_the_weights_then_the_data(tmp_path: Path) -> None:
    given, data = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.7, 0.7, 0.7), (0.2, 0.2, 0.2))
    assert statistics(create("timm/test_vit", mean=given[0], std=given[1], data_statistics=data)) == given
    assert statistics(create("timm/test_vit", data_statistics=data)) == data
    assert statistics(create("timm/test_vit")) == IMAGENET
    model = create("timm/test_vit")
    torch.save(model.get_submodule("net").state_dict(), tmp_path / "a.pt")
    assert statistics(create("timm/test_vit", weights=tmp_path / "a.pt", data_statistics=data)) == HALF
    assert statistics(create("small_cnn", data_statistics=data)) == data


def test_a_checkpoint_of_our_own_brings_its_statistics_along(tmp_path: Path) -> None:
    trained = create("timm/test_resnet", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), seed=0).eval()
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="holds its own normalisation"):
        model = create("timm/test_resnet", weights=tmp_path / "a.safetensors").eval()
    assert torch.equal(model(images(32)), trained(images(32)))


def test_a_file_that_does_not_say_how_to_normalise_is_remarked_for_built_in_networks_only(tmp_path: Path) -> None:
    state = {k: v for k, v in create("small_cnn").state_dict().items() if not k.startswith("normalize.")}
    torch.save(state, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"a\.pt does not say how its images were normalised: mean=\[0\.49"):
        create("small_cnn", weights=tmp_path / "a.pt")
    create("small_cnn", weights=tmp_path / "a.pt", mean=(0.0,) * 3, std=(1.0,) * 3)


def test_weights_for_other_classes_can_keep_a_new_classifier(tmp_path: Path) -> None:
    trained = create("timm/test_vit", num_classes=9, seed=1)
    torch.save(trained.get_submodule("net").state_dict(), tmp_path / "a.pt")
    with pytest.raises(InputError, match="num_classes=9, or keep a new last layer with classifier='new'"):
        create("timm/test_vit", num_classes=4, weights=tmp_path / "a.pt")
    model = create("timm/test_vit", num_classes=4, weights=tmp_path / "a.pt", classifier="new", seed=2)
    fresh = create("timm/test_vit", num_classes=4, seed=2)
    assert torch.equal(model.state_dict()["net.head.weight"], fresh.state_dict()["net.head.weight"])
    assert torch.equal(model.state_dict()["net.norm.weight"], trained.state_dict()["net.norm.weight"])
    patches = "net.patch_embed.proj.weight"
    assert torch.equal(model.state_dict()[patches], trained.state_dict()[patches])


def test_a_seed_draws_the_weights_of_a_network_from_elsewhere() -> None:
    before = torch.get_rng_state()
    first, again, other = (create("timm/test_resnet", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["net.fc.weight"], other["net.fc.weight"])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and no network; returns the folder of the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


def test_published_weights_that_cannot_be_fetched_are_told_in_one_line(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    for spec in ("timm/resnet18.a1_in1k", "torchvision/resnet18"):
        with pytest.raises(InputError, match=r"published weights of .*resnet18.* cannot be had .*=FILE") as error:
            create(spec, pretrained=True)
        assert "\n" not in str(error.value)


def test_pretrained_torchvision_weights_are_loaded_and_the_classifier_is_new_for_other_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    published = resnet18().state_dict()
    asked: dict[str, Any] = {}

    def state_dict(_: ResNet18_Weights, **settings: Any) -> dict[str, Tensor]:
        asked.update(settings)
        return published

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", state_dict)
    thousand = create("torchvision/resnet18", num_classes=1000, pretrained=True).state_dict()
    ten = create("torchvision/resnet18", pretrained=True, data_statistics=HALF)
    assert all(torch.equal(thousand[f"net.{name}"], value) for name, value in published.items())
    assert torch.equal(ten.state_dict()["net.conv1.weight"], published["conv1.weight"])
    assert ten.state_dict()["net.fc.weight"].shape[0] == 10
    assert statistics(ten) == IMAGENET
    assert asked["weights_only"]


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("timm/resnet81", {}, "unknown timm model 'resnet81'; did you mean 'resnet18'"),
        ("timm/resnet18.a9_in1k", {}, "unknown weights of timm/resnet18 'resnet18.a9_in1k'; did you mean 'resnet18.a"),
        ("timm/hf-hub:someone/model", {}, "unknown timm model 'hf-hub:someone/model'"),
        ("timm/", {}, "unknown timm model ''"),
        ("torchvision/resnet81", {}, "unknown torchvision model 'resnet81'; did you mean 'resnet18'"),
        ("torchvision/inception_v3", {}, "returns several logits in training; take timm/inception_v3"),
        ("torchvision/resnet18", {"in_channels": 1}, "torchvision/resnet18 takes 3 channels, not 1"),
        ("torchvision/vit_b_32", {"image_size": 32}, "32x32 images with 3 channels: AssertionError: Wrong image"),
        ("timm/test_vit", {"width": 8}, "width is 8, and timm/test_vit has its own"),
        ("timm/test_vit", {"image_size": 0}, "image_size is 0"),
        ("timm/vit_tiny_patch16_224", {"image_size": 8}, "8x8 images"),
        ("timm/resnet18", {"pretrained": True, "weights": "a.pt"}, "pretrained and weights=a.pt are both given"),
        ("resnet18", {"pretrained": True}, "resnet18 cannot be had pretrained, since it publishes none"),
        ("resnet18", {"weights": "nowhere.pt"}, "no weights file nowhere.pt"),
        ("time/resnet18", {}, "unknown model 'time/resnet18'"),
        ("hub/alone", {}, "hub/alone is not of the form hub/OWNER/REPO"),
        ("hub/../../etc", {}, "is not of the form hub/OWNER/REPO"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(spec: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        create(spec, **settings)
    assert "\n" not in str(error.value)


# -- the Hugging Face hub -------------------------------------------------------------------------


def in_cache(
    cache: Path, config: dict[str, Any] | str, network: nn.Module | None = None, *, repository: str = "someone/model"
) -> None:
    """Put a repository into a cache of the hub, as a download leaves it."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if network is not None:
        save_file(network.state_dict(), snapshot / "model.safetensors")


def test_a_model_of_the_hub_is_built_from_the_cache_with_its_weights_and_statistics(offline: Path) -> None:
    import timm

    network = timm.create_model("test_resnet", num_classes=6, act_layer="gelu").eval()
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    arguments = {"act_layer": "gelu", "num_classes": 6, "checkpoint_path": "/nowhere.pt", "pretrained": True}
    config = {"architecture": "test_resnet", "num_classes": 6, "model_args": arguments, "pretrained_cfg": facts}
    in_cache(offline, config, network)

    model = create("hub/someone/model", num_classes=6, data_statistics=HALF).eval()

    assert torch.equal(model(images(32)), network(normalised(images(32), facts["mean"], facts["std"])))
    with pytest.raises(InputError, match=r"'net\.fc\.weight' is .* build the model with num_classes=6"):
        create("hub/someone/model", num_classes=10)


def test_pretrained_timm_weights_are_loaded_and_the_classifier_is_new_where_asked_or_needed(offline: Path) -> None:
    import timm

    published = timm.create_model("test_resnet")
    in_cache(offline, {}, published, repository="timm/test_resnet.r160_in1k")

    def built(**settings: Any) -> nn.Module:
        return create("timm/test_resnet", pretrained=True, seed=0, **settings)

    thousand, new, ten = built(num_classes=1000), built(num_classes=1000, classifier="new"), built(num_classes=10)
    own = published.state_dict()
    assert all(torch.equal(thousand.state_dict()[f"net.{name}"], value) for name, value in own.items())
    for model in (new, ten):
        assert torch.equal(model.state_dict()["net.layer1.0.conv1.weight"], own["layer1.0.conv1.weight"])
        assert not torch.equal(model.state_dict()["net.fc.weight"][:10], own["fc.weight"][:10])
    assert statistics(ten) == HALF


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "no config.json in timm's form"),
        ("<html>", "no config.json in timm's form"),
        ({"architecture": "test_resnet", "model_args": 3}, "no config.json in timm's form"),
        ({"architecture": "os.system"}, "unknown timm model 'os.system'"),
        ({"architecture": "test_resnet", "model_args": {"depth": 3}}, "hub/someone/model cannot be built with"),
        ({"architecture": "test_resnet"}, "cannot be had"),  # a pickle may be there, safetensors are not
    ],
)
def test_a_repository_of_another_kind_is_told_in_one_line(
    offline: Path, config: dict[str, Any] | str, message: str
) -> None:
    in_cache(offline, config)
    with pytest.raises(InputError, match=message) as error:
        create("hub/someone/model")
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_in_the_cache_cannot_be_had_offline(offline: Path) -> None:
    with pytest.raises(InputError, match="published weights of hub/someone/model cannot be had"):
        create("hub/someone/model")


# -- the user's functions -------------------------------------------------------------------------


class Linear(nn.Module):
    """Flat images to logits."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class NormalizedLinear(Linear):
    """Normalises by plain attributes."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class WithBuffers(Linear):
    """Normalises by buffers."""

    def __init__(self) -> None:
        super().__init__(192, 10)
        self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
        self.register_buffer("sigma", torch.ones(1, 3, 1, 1))


class Noise(nn.Module):
    """A layer whose parameters have such names, but are no statistics of images."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.norm = nn.LayerNorm(3)

    def mean(self) -> float:
        return 0.0


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_a_function_gets_what_it_has_parameters_for(mine: types.ModuleType) -> None:
    calls: list[dict[str, Any]] = []

    def sized(num_classes: int, image_size: int, depth: int = 3) -> nn.Module:
        calls.append({"num_classes": num_classes, "image_size": image_size, "depth": depth})
        return Linear(3 * image_size**2, num_classes)

    def open_ended(**kwargs: Any) -> nn.Module:
        calls.append(kwargs)
        return Linear(192, kwargs["num_classes"])

    mine.sized, mine.open_ended, mine.fixed = sized, open_ended, lambda: Linear(192, 10)  # type: ignore[attr-defined]
    model = create("mine:sized", num_classes=7, image_size=8)
    assert model(images(8)).shape == (2, 7)
    assert create("mine:open_ended", num_classes=4)(images(8)).shape == (2, 4)
    assert isinstance(create("mine:fixed"), Linear)
    assert calls == [{"num_classes": 7, "image_size": 8, "depth": 3}, {"num_classes": 4}]


def test_a_users_network_is_normalised_only_when_asked(mine: types.ModuleType) -> None:
    mine.build = lambda: Linear(192, 10)  # type: ignore[attr-defined]
    plain = create("mine:build", seed=0, data_statistics=HALF)
    wrapped = create("mine:build", seed=0, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert type(plain) is Linear
    assert torch.equal(wrapped(images(8)), plain(normalised(images(8), (0.5,) * 3, (0.25,) * 3)))


@pytest.mark.parametrize(
    ("network", "part"),
    [
        (lambda: NormalizedLinear(192, 10), "NormalizedLinear"),
        (WithBuffers, "WithBuffers"),
        (lambda: nn.Sequential(nn.Identity(), Normalize((0.5,) * 3, (0.5,) * 3), Linear(192, 10)), r"1 \(Normalize\)"),
    ],
)
def test_normalising_twice_is_warned_of(mine: types.ModuleType, network: Any, part: str) -> None:
    mine.build = network  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=f"normalises its images itself, in {part}: .* normalised twice"):
        create("mine:build", mean=(0.5,) * 3, std=(0.25,) * 3)


def test_norm_layers_and_parameters_of_like_names_are_not_taken_for_normalisation(mine: types.ModuleType) -> None:
    mine.build = lambda: nn.Sequential(Noise(), nn.BatchNorm2d(3), Linear(192, 10))  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create("mine:build", mean=(0.5,) * 3, std=(0.25,) * 3)


def test_a_function_that_cannot_be_used_is_told_in_one_line(mine: types.ModuleType) -> None:
    mine.needs_depth = lambda num_classes, depth: None  # type: ignore[attr-defined]
    mine.number = lambda: 3  # type: ignore[attr-defined]
    mine.wrong = lambda: Linear(192, 3)  # type: ignore[attr-defined]
    for spec, settings, message in (
        ("nowhere.models:build", {}, "No module named 'nowhere'.*set PYTHONPATH to the folder"),
        ("mine:number_", {}, "unknown function in mine 'number_'; did you mean 'number'"),
        ("mine:needs_depth", {}, "cannot be called with num_classes: missing a required argument: 'depth'"),
        ("mine:number", {}, "mine:number returns a int; it must return a torch.nn.Module"),
        ("mine:wrong", {"image_size": 8}, "the model has 3 classes and the data 10"),
        ("mine:wrong", {"mean": (0.5,) * 3}, "only one of mean and std"),
        ("mine:wrong", {"pretrained": True}, "mine:wrong cannot be had pretrained"),
    ):
        with pytest.raises(InputError, match=message) as error:
            create(spec, **settings)
        assert "\n" not in str(error.value)


def test_a_module_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "downloaded.py").write_text("open('ran', 'w')\ndef build(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = list(sys.path)
    with pytest.raises(InputError, match="No module named 'downloaded'"):
        create("downloaded:build")
    assert not (tmp_path / "ran").exists()
    assert sys.path == before


# -- names ----------------------------------------------------------------------------------------


def test_names_are_listed_by_pattern() -> None:
    assert "resnet18" in model_names()
    assert not [name for name in model_names() if "/" in name]
    assert model_names("*resnet18") == sorted(["resnet18", "preact_resnet18", *model_names("t*/*resnet18")])
    assert {"timm/resnet18", "timm/resnet18.a1_in1k"} <= set(model_names("timm/resnet18*"))
    assert model_names("torchvision/densenet1[26]1") == ["torchvision/densenet121", "torchvision/densenet161"]
    assert "robustbench/cifar10/L2/Wang2023Better_WRN-28-10" in model_names("robustbench/*Wang*")
    assert model_names("nothing*") == []


def test_every_listed_name_is_a_spec() -> None:
    for pattern in (None, "torchvision/*", "robustbench/*", "timm/resnet*"):
        for name in model_names(pattern):
            check_spec(name)


def test_a_folder_or_file_name_is_no_spec() -> None:
    assert is_spec("resnet18")
    assert is_spec("hub/someone/model")
    assert not [text for text in ("runs/a", "weights.pt", "resnet81", "robustbench/mine", "a:b:c") if is_spec(text)]


def test_timm_and_torchvision_are_not_imported_for_built_in_networks() -> None:
    code = (  # torchmetrics, which Fabric imports where it is installed, imports torchvision
        "import sys; sys.modules['torchmetrics'] = None;"
        " from toughen.models import create, check_spec, model_names; create('small_cnn');"
        " check_spec('robustbench/Peng2023Robust'); model_names('wrn*');"
        " sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("chosen", [True, False])
def test_whether_timm_checks_hashes_stays_the_choice_of_the_program(chosen: bool) -> None:
    from timm.models import _builder, set_pretrained_check_hash

    before = _builder._CHECK_HASH
    try:
        set_pretrained_check_hash(chosen)
        for name in ("resnet18.tv_in1k", "test_resnet"):  # one has a hash in its address
            create(f"timm/{name}", num_classes=10, in_channels=1, image_size=32, pretrained=False)
            assert _builder._CHECK_HASH is chosen
    finally:
        set_pretrained_check_hash(before)
