import argparse
import contextlib
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.models import Normalize, create, fit_weights, load_weights, read_weights, restore_weights

State = dict[str, Tensor]


def net(*, seed: int = 0, **settings: Any) -> nn.Module:
    return create("small_cnn", width=2, seed=seed, **settings)


def without_statistics(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("normalize.")}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def weights_of(model: nn.Module) -> State:
    return without_statistics(model.state_dict())


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# -- reading --------------------------------------------------------------------------------------


def test_safetensors_are_known_by_content_and_a_torch_file_of_that_name_is_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "a.pt")
    assert same(read_weights(tmp_path / "a.pt"), state)
    torch.save(state, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"not safetensors; if it is a torch file, rename it to \.pt"):
        read_weights(tmp_path / "b.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_is_read_with_what_scripts_put_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    document = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, data=Path("data"), layers=[1, 2]),
        "best": np.float64(0.5),
        "counts": np.arange(3),
        "flags": np.array([True]),
        "rng": np.random.RandomState(0).get_state(),
        "milestones": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]).state_dict(),
    }
    torch.save(document, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=zipped)

    tensors = read_weights(tmp_path / "checkpoint.pt")

    assert torch.equal(tensors["state_dict/linear.weight"], model.state_dict()["linear.weight"])
    assert "optimizer/state/0/momentum_buffer" in tensors


@pytest.mark.parametrize(
    ("now", "then"), [("numpy._core.multiarray", "numpy.core.multiarray"), ("pathlib", "pathlib._local")]
)
def test_names_that_numpy_1_and_python_3_13_wrote_are_read_too(tmp_path: Path, now: str, then: str) -> None:
    document = {"net": net().state_dict(), "best": np.float64(0.5), "path": Path("a"), "counts": np.arange(2)}
    torch.save(document, tmp_path / "now.pt")
    with zipfile.ZipFile(tmp_path / "now.pt") as written, zipfile.ZipFile(tmp_path / "then.pt", "w") as renamed:
        for entry in written.namelist():
            content = written.read(entry)
            if entry.endswith("data.pkl"):
                assert f"c{now}\n".encode() in content
                content = content.replace(f"c{now}\n".encode(), f"c{then}\n".encode())
            renamed.writestr(entry, content)
    assert same(read_weights(tmp_path / "then.pt"), prefixed("net/", net().state_dict()))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.victim,)


class Settings:
    """A class of the training script, as many checkpoints hold."""

    lr = 0.1


@pytest.mark.parametrize(
    "save",
    [
        lambda value, file: file.write_bytes(pickle.dumps(value)),
        lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2)),
        torch.save,
        lambda value, file: torch.save({"net": {"a": torch.zeros(1), "b": [value]}}, file),
        lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    ],
    ids=["pickle", "pickle 2", "zip", "nested in a zip", "before zips"],
)
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    victim, file = tmp_path / "victim", tmp_path / "weights.pt"
    save(Bomb(victim), file)
    with pytest.raises(InputError, match=r"weights\.pt (needs|is damaged)") as error:
        load_weights(net(), file)
    assert "\n" not in str(error.value)
    assert not victim.exists()


def test_a_class_that_may_run_code_is_named_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"net": net().state_dict(), "settings": Settings()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"needs \S*test_weights\.Settings to be unpickled.*save torch\.save"):
        read_weights(tmp_path / "a.pt")
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"needs \S*SmallCNN to be unpickled"):
        read_weights(tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not weights; its download needs a login"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"just some words that somebody wrote", "is text, not weights"),
        (b"PK\x03\x04 and no zip", "is damaged, or no weights file"),
    ],
)
def test_a_file_of_another_kind_is_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "a.pt")


def test_a_folder_a_missing_file_and_a_file_without_tensors_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="is a folder; give the weights file inside it"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match=r"no weights file .*nowhere\.pt"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="holds no named tensors, only a list"):
        read_weights(tmp_path / "list.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "before zips"])
def test_a_truncated_or_flipped_file_is_refused_or_read_and_nothing_else(tmp_path: Path, kind: str) -> None:
    state, file = net().state_dict(), tmp_path / "a.pt"
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    content, draw = file.read_bytes(), random.Random(0)
    for share in (0.1, 0.5, 0.9, 0.999):
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError) as error:
            read_weights(file)
        assert "\n" not in str(error.value)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(damaged))
        with contextlib.suppress(InputError):  # a flipped weight is a weight
            read_weights(file)


def test_a_mapping_that_holds_itself_ends(tmp_path: Path) -> None:
    document: dict[str, Any] = {"net": net().state_dict()}
    document["self"] = document
    torch.save(document, tmp_path / "a.pt")
    assert all(name.startswith("net/") for name in read_weights(tmp_path / "a.pt"))


def test_a_tensor_without_data_counts_as_missing(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save({**state, "linear.bias": state["linear.bias"].to("meta")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"it lacks 1 of \d+ tensors \(linear\.bias\)"):
        load_weights(net(), tmp_path / "a.pt")


# -- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: prefixed("module.", s),
        lambda s: prefixed("_orig_mod.module.", s),
        lambda s: prefixed("1.", s),
        lambda s: prefixed("backbone/", s),
        lambda s: {"epoch/count": torch.tensor(3), **prefixed("state_dict/module.model.", s)},
        lambda s: {**prefixed("optimizer/state/0/", {"momentum_buffer": torch.zeros(3)}), **prefixed("net/", s)},
        lambda s: {"n_averaged": torch.tensor(5), **prefixed("module.", s)},
        lambda s: {**prefixed("module.model.", s), **prefixed("module.attacker.model.", s)},
        lambda s: {k: v for k, v in s.items() if "num_batches_tracked" not in k},
        lambda s: {**s, "sub_block1.layer.0.conv1.weight": torch.zeros(2, 2)},
        lambda s: {**s, "conv.total_ops": torch.zeros(1)},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
        lambda s: {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()},
    ],
)
def test_whatever_wrapped_the_network_its_weights_are_found(wrap: Callable[[State], State]) -> None:
    trained, model = net(seed=1), net(seed=2)
    fit_weights(model, wrap(weights_of(trained)), source="file")
    for name, value in weights_of(model).items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, trained.state_dict()[name], rtol=1e-2, atol=1e-2)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_the_mapping_that_fits_is_taken_not_the_first_or_the_largest() -> None:
    trained, model = net(seed=1), net(seed=2)
    teacher = prefixed("teacher/", weights_of(create("small_cnn", width=4)))
    unfit = prefixed("other/", {"linear.weight": torch.zeros(1, 1), "linear.bias": torch.zeros(1)})
    fit_weights(model, {**unfit, **teacher, **prefixed("student/", weights_of(trained))}, source="file")
    assert same(weights_of(model), weights_of(trained))


def test_of_several_sets_that_fit_the_first_is_taken_and_said() -> None:
    first, second, model = net(seed=1), net(seed=2), net(seed=3)
    tensors = {**prefixed("model/", weights_of(first)), **prefixed("ema/", weights_of(second))}
    with pytest.warns(UserWarning, match="several sets of weights that fit: model is used, and not ema"):
        fit_weights(model, tensors, source="file")
    assert same(weights_of(model), weights_of(first))


def test_equal_sets_need_no_word() -> None:
    trained, model = net(seed=1), net(seed=3)
    fit_weights(model, {**prefixed("a/", weights_of(trained)), **prefixed("b/", weights_of(trained))}, source="file")
    assert same(weights_of(model), weights_of(trained))


def test_a_wrapped_network_takes_the_weights_of_the_bare_one() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    wrapped = nn.Sequential(OrderedDict(normalize=Normalize((0.5,) * 3, (0.5,) * 3), net=nn.Sequential(*bare)))
    fresh = nn.Sequential(
        OrderedDict(
            normalize=Normalize((0.5,) * 3, (0.5,) * 3),
            net=nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2)),
        )
    )
    fit_weights(fresh, bare.state_dict(), source="file")
    assert same(fresh.state_dict(), wrapped.state_dict())


def refused(tensors: State, model: nn.Module | None = None, **settings: Any) -> str:
    """The message, once it is sure that the model was left as it is."""
    model = net() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        fit_weights(model, tensors, source="file", **settings)
    assert same(model.state_dict(), before)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_told_with_counts_names_and_shapes() -> None:
    state = weights_of(net(seed=1))
    lacking = {key: value for key, value in state.items() if not key.startswith("layer1")}
    assert re.search(
        r"^file belongs to another model: it lacks 10 of 32 tensors \(layer1\.0\.conv\.weight, layer1\.0\.bn\.weight,"
        r" .* and 5 more\); was it saved from another architecture, width or image size\?$",
        refused(lacking),
    )
    assert "it has 1 others (head.weight)" in refused({**state, "head.weight": torch.zeros(3)})
    assert "'linear.bias' is [10] of torch.int64 in the file and [10] in the model" in refused(
        {**state, "linear.bias": state["linear.bias"].long()}
    )
    assert "it lacks 32 of 32 tensors" in refused({"something": torch.zeros(3)})


def test_copies_that_are_not_equal_are_not_ignored() -> None:
    state, other = weights_of(net(seed=1)), weights_of(net(seed=2))
    message = refused({**prefixed("module.model.", state), **prefixed("module.attacker.model.", other)})
    assert "others (module.attacker.model." in message


def test_weights_for_other_classes_need_a_word_about_the_last_layer() -> None:
    hundred = net(seed=1, num_classes=100)
    message = refused(weights_of(hundred))
    assert "'linear.weight' is [100, 8] in the file and [10, 8] in the model" in message
    assert "build the model with num_classes=100, or keep a new last layer with classifier='new'" in message

    model, drawn = net(seed=2), net(seed=2).state_dict()
    fit_weights(model, weights_of(hundred), source="file", classifier="new")
    for name, value in weights_of(model).items():
        expected = drawn if name.startswith("linear") else hundred.state_dict()
        assert torch.equal(value, expected[name]), name


def test_a_new_classifier_is_new_for_as_many_classes_too() -> None:
    model, trained = net(seed=2), net(seed=1)
    fit_weights(model, weights_of(trained), source="file", classifier="new")
    assert torch.equal(model.state_dict()["linear.weight"], net(seed=2).state_dict()["linear.weight"])
    assert torch.equal(model.state_dict()["layer1.0.conv.weight"], trained.state_dict()["layer1.0.conv.weight"])


def test_a_hidden_layer_of_another_shape_is_never_taken_for_the_classifier() -> None:
    wider = weights_of(create("small_cnn", width=4, num_classes=100))
    assert "was it saved from another architecture" in refused(wider)
    assert "layer1.0.conv.weight" in refused(wider, classifier="new")


def test_a_new_classifier_needs_a_linear_last_layer_and_a_known_word() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    assert "keeps a last layer that is linear, and Sequential has none" in refused({}, model, classifier="new")
    assert "unknown classifier 'fresh'" in refused({}, model, classifier="fresh")


# -- statistics of the images ---------------------------------------------------------------------

MEAN, STD = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("mu", "sigma"),
        ("mean", "std"),
        ("0.mean", "0.std"),
        ("normalize.mean", "normalize.std"),
        ("module.normalizer.new_mean", "module.normalizer.new_std"),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_the_files_own_normalisation_takes_the_place_of_the_models(mean: str, std: str, shape: tuple[int, ...]) -> None:
    trained = net(seed=1, mean=MEAN.tolist(), std=STD.tolist()).eval()
    prefix = "module.model." if mean.startswith("module") else "1." if mean.startswith("0") else ""
    tensors = {mean: MEAN.view(shape), std: STD.view(shape), **prefixed(prefix, weights_of(trained))}
    model, x = net(seed=2).eval(), torch.rand(2, 3, 8, 8)

    with pytest.warns(UserWarning, match=r"file holds its own normalisation, mean and std \(0\.1, 0\.2, 0\.3\) and"):
        brought = fit_weights(model, tensors, source="file")

    assert brought
    assert torch.equal(model(x), trained(x))


def test_the_same_normalisation_needs_no_word_and_none_leaves_the_models() -> None:
    trained = net(seed=1, mean=MEAN.tolist(), std=STD.tolist())
    model = net(seed=2, mean=MEAN.tolist(), std=STD.tolist())
    assert fit_weights(model, trained.state_dict(), source="file")
    assert not fit_weights(model, weights_of(net(seed=3)), source="file")
    assert torch.equal(model.state_dict()["normalize.mean"].flatten(), MEAN)


def test_one_number_for_all_channels_is_spread() -> None:
    model = net()
    with pytest.warns(UserWarning, match="its own normalisation"):
        fit_weights(model, {"mu": torch.tensor(0.5), "sigma": torch.tensor([0.25]), **weights_of(net())}, source="file")
    assert model.state_dict()["normalize.mean"].flatten().tolist() == [0.5] * 3
    assert model.state_dict()["normalize.std"].flatten().tolist() == [0.25] * 3


def test_statistics_that_cannot_be_used_are_refused() -> None:
    state = weights_of(net())
    assert "mean (123.7, 116.3, 103.5)" in refused(
        {"mean": torch.tensor([123.7, 116.3, 103.5]), "std": torch.tensor([58.4, 57.1, 57.4]), **state}
    )
    assert "cannot be of pixels" in refused({"mean": MEAN, "std": torch.zeros(3), **state})
    assert "several statistics of images that differ" in refused(
        {"mu": MEAN, "sigma": STD, "a.mean": STD, "a.std": STD, **state}
    )
    assert "it has 2 others (mean, std)" in refused({"mean": torch.zeros(7), "std": torch.ones(7), **state})


def test_a_model_that_does_not_normalise_refuses_statistics() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 3)))
    message = refused({"mu": MEAN, "sigma": STD, **model.state_dict()}, model)
    assert "holds mean (0.1, 0.2, 0.3) and std (0.5, 0.6, 0.7) for images, and the model does not normalise" in message


# -- weights of the very same model ---------------------------------------------------------------


def test_a_model_is_restored_with_its_statistics_and_without_a_word(tmp_path: Path) -> None:
    trained = net(seed=1, mean=MEAN.tolist(), std=STD.tolist())
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    model = net(seed=2)
    restore_weights(model, tmp_path / "a.safetensors")
    assert same(model.state_dict(), trained.state_dict())


def test_restoring_is_exact_about_names(tmp_path: Path) -> None:
    torch.save(prefixed("module.", net().state_dict()), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"it lacks 40 of 40 tensors .* it has 40 others"):
        restore_weights(net(), tmp_path / "a.pt")


class HeadFirst(nn.Module):
    """Defines its classifier before its other layers, and says which it is, as timm's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Conv2d(1, 4, 1)

    def get_classifier(self) -> nn.Module:
        return self.head


def test_the_new_classifier_is_what_the_network_calls_so(tmp_path: Path) -> None:
    saved, model = HeadFirst(), HeadFirst()
    drawn = model.head.weight.clone()
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt", classifier="new")
    assert torch.equal(model.head.weight, drawn)
    assert torch.equal(model.body.weight, saved.body.weight)


def test_a_refused_pickle_of_a_newer_protocol_says_what_could_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(OrderedDict(a=1), protocol=4))
    with pytest.raises(InputError, match="without running it: Unsupported operand"):
        read_weights(tmp_path / "weights.pth")
