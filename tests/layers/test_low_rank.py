"""Low-rank adapters: their formulas, what a model with them still is, and how they go away again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from as_found import same
from toughen.attacks import PGD
from toughen.criticality import analyze
from toughen.errors import InputError
from toughen.layers import ModelView, TrainableSet, map_layers
from toughen.layers.low_rank import LowRank, adaptable, adapters, attach_adapters, merge_adapters, originals
from toughen.types import ThreatModel
from zoo import build, images

X, Y = images(4)
PGD2 = PGD(ThreatModel(eps=0.1), step_size=0.05, steps=2)
FORMS = ("conv", "1x1")
LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "circular": nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
    "oblong": nn.Conv2d(4, 6, (1, 3)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "pointwise": nn.Conv2d(4, 6, 1),
    "linear": nn.Linear(4, 6),
}


def attach(model, *names, rank=2, seed=0, **settings):
    draw = torch.Generator().manual_seed(seed)
    attach_adapters(model, names or tuple(adaptable(model)), rank=rank, generator=draw, **settings)
    return model


def moved(model, *, seed=5):
    """The model after its adapters have learned something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in set(adapters(model).values()):
            adapter.b.copy_(0.3 * torch.randn(adapter.b.shape, generator=draw))
    return model


def changed_layer(kind, form, *, dtype=torch.float64, **settings):
    """A layer of a kind with an adapter that has learned, its weight before, and the adapter."""
    model = nn.Sequential(copy.deepcopy(LAYERS[kind])).to(dtype)
    weight = model[0].weight.detach().clone()
    moved(attach(model, form=form, **settings))
    return model, weight, adapters(model)["0"]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_form_of_convlora_is_its_formula(kind):
    model, weight, adapter = changed_layer(kind, "conv", rank=2, alpha=3.0)
    o, i, *k = weight.shape
    groups = getattr(LAYERS[kind], "groups", 1)
    height, width = k or (1, 1)
    assert adapter.a.shape == (2 * height, i * groups * width)
    assert adapter.b.shape == (o // groups * height, 2 * height)
    product = torch.stack([torch.stack([(row * column).sum() for column in adapter.a.T]) for row in adapter.b])
    expected = weight + 3.0 / 2 * product.reshape(weight.shape)
    torch.testing.assert_close(model[0].weight, expected)


@pytest.mark.parametrize("kind", ["plain", "strided", "dilated", "circular", "oblong", "pointwise"])
def test_the_1x1_form_is_a_convolution_to_r_channels_and_a_pointwise_one(kind):
    model, weight, adapter = changed_layer(kind, "1x1", rank=3, alpha=6.0)
    assert adapter.a.shape == (3, *weight.shape[1:])
    assert adapter.b.shape == (weight.shape[0], 3)
    inside, base = copy.deepcopy(LAYERS[kind]).double(), copy.deepcopy(LAYERS[kind]).double()
    inside.weight, inside.bias, inside.out_channels = nn.Parameter(adapter.a.detach()), None, 3
    x = torch.rand(2, 4, 9, 9, dtype=torch.float64)
    expected = base(x) + 2.0 * F.conv2d(inside(x), adapter.b[:, :, None, None])
    torch.testing.assert_close(model(x), expected)


def test_of_grouped_convolutions_each_group_has_the_r_channels_of_its_own_inputs():
    model, weight, adapter = changed_layer("grouped", "1x1", rank=1)
    expected = weight + torch.einsum("or,rikl->oikl", adapter.b, adapter.a)
    torch.testing.assert_close(model[0].weight, expected)
    assert adapter.a.shape == (1, 2, 3, 3)


@pytest.mark.parametrize("form", FORMS)
def test_of_a_linear_map_and_a_pointwise_convolution_it_is_plain_lora(form):
    for kind in ("linear", "pointwise"):
        model, weight, adapter = changed_layer(kind, form)
        product = adapter.b @ adapter.a.flatten(1)
        torch.testing.assert_close(model[0].weight - weight, product.view(weight.shape))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_number_of_parameters_is_that_of_the_formula(kind):
    _, weight, adapter = changed_layer(kind, "conv", rank=2)
    groups = getattr(LAYERS[kind], "groups", 1)
    o, i, k = weight.shape[0], weight.shape[1] * groups, weight.shape[2] if weight.dim() == 4 else 1
    count = sum(p.numel() for p in adapter.parameters())
    if kind != "oblong":
        assert count == 2 * k * (i * k + o * k // groups)
    assert count == adapter.a.numel() + adapter.b.numel()


@pytest.mark.parametrize(("form", "most"), [("conv", 2 * 3), ("1x1", 2)])
def test_the_rank_of_the_change_is_bounded(form, most):
    layer = nn.Sequential(nn.Conv2d(16, 16, 3)).double()
    before = layer[0].weight.detach().clone()
    moved(attach(layer, form=form, rank=2))
    change = (layer[0].weight - before).detach()
    assert torch.linalg.matrix_rank(change.reshape(16 * 3, 16 * 3) if form == "conv" else change.flatten(1)) == most


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["normed", "tied", "called_twice", "attention", "by_keyword", "resnet18"])
def test_with_b_at_zero_the_model_is_the_same_bit_for_bit(name, form):
    model = build(name).eval().to(memory_format=torch.channels_last)
    expected = model(X).detach()
    adapted = attach(copy.deepcopy(model), form=form)
    assert same(adapted(X).detach(), expected)
    assert len(adapters(adapted)) >= 2
    for name, layer in adaptable(model).items():
        weight, like = adapted.get_submodule(name).weight, torch.channels_last if layer.weight.dim() == 4 else None
        assert like is None or weight.is_contiguous(memory_format=like)


def test_the_scale_of_alpha_none_is_one_and_the_weights_go_with_the_seed():
    layer = nn.Conv2d(64, 8, 3)
    a, b, c = (attach(nn.Sequential(copy.deepcopy(layer)), seed=seed, rank=16) for seed in (0, 0, 1))
    assert adapters(a)["0"].scale == 1.0
    assert same(adapters(a)["0"].a, adapters(b)["0"].a)
    assert not same(adapters(a)["0"].a, adapters(c)["0"].a)
    bound = (64 * 3) ** -0.5
    assert 0.99 * bound < float(adapters(a)["0"].a.detach().abs().max()) <= bound
    assert not adapters(a)["0"].b.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["normed", "tied", "called_twice", "attention", "resnet18"])
def test_merging_leaves_a_plain_model_of_the_same_function_bit_for_bit(name, form):
    plain = build(name).eval()
    model = copy.deepcopy(plain)
    weights = {id(p) for p in model.parameters()}
    moved(attach(model, form=form))
    expected = model(X).detach()
    assert not same(expected, plain(X).detach())
    merge_adapters(model)
    assert same(model(X).detach(), expected)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert {id(p) for p in model.parameters()} == weights
    assert not adapters(model)
    merge_adapters(model)
    assert same(model(X).detach(), expected)


def test_merging_a_copy_leaves_the_model_its_adapters():
    model = moved(attach(build("normed").eval()))
    expected, state = model(X).detach(), {n: v.clone() for n, v in model.state_dict().items()}
    for _ in range(2):
        merge_adapters(copy.deepcopy(model))
    assert same(model(X).detach(), expected)
    assert list(model.state_dict()) == list(state)
    assert all(same(value, state[name]) for name, value in model.state_dict().items())
    merge_adapters(model)
    assert same(model(X).detach(), expected)


def test_modes_do_not_merge():
    model = moved(attach(build("nested")))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    for _ in range(3):
        model.eval()
        model(X)
        model.train()
    assert all(same(value, before[name]) for name, value in model.state_dict().items())


def test_layers_of_one_weight_share_an_adapter_even_if_only_one_is_named():
    model = attach(build("tied"), "a")
    assert set(adapters(model)) == {"a", "b"}
    assert adapters(model)["a"] is adapters(model)["b"]
    assert originals(model)["a"] is originals(model)["b"]
    moved(model)
    assert same(model.a.weight, model.b.weight)
    merge_adapters(model)
    assert model.a.weight is model.b.weight


def test_a_weight_that_is_computed_already_is_left_alone():
    model = build("backwards")
    parametrizations.spectral_norm(model.second)
    torch.nn.utils.parametrizations.weight_norm(model.third)
    assert list(adaptable(model)) == ["head.fc", "first"]
    state = attach(model).state_dict()
    merge_adapters(model)
    assert [name for name in state if "second" in name] == [name for name in model.state_dict() if "second" in name]
    with pytest.raises(InputError, match="unknown layer to adapt 'second'"):
        attach(model, "second")


def test_a_name_that_is_no_layer_is_refused():
    with pytest.raises(InputError, match="unknown layer to adapt 'firstt'; did you mean 'first'"):
        attach(build("backwards"), "firstt")


# -- a model with adapters in the rest of the package ------------------------------------------------


def test_the_map_of_layers_is_the_same_but_for_the_parameters():
    plain, model = build("resnet18"), attach(build("resnet18"))
    for granularity in ("weights", "leaves", "blocks"):
        expected, found = (map_layers(m, X, granularity=granularity) for m in (plain, model))
        for field in ("index", "name", "num_features", "num_inputs", "num_calls", "norm", "classifier"):
            assert [getattr(layer, field) for layer in found] == [getattr(layer, field) for layer in expected]
        assert found.notes() == expected.notes()
    layer = map_layers(model, X).by_name("layer1.0.conv1")
    assert {name.removeprefix("layer1.0.conv1.parametrizations.weight.") for name in layer.parameters} == {
        "original",
        "0.a",
        "0.b",
    }
    assert layer.num_parameters == plain.layer1[0].conv1.weight.numel() + sum(
        p.numel() for p in adapters(model)["layer1.0.conv1"].parameters()
    )


def test_criticality_is_that_of_the_merged_model():
    model = moved(attach(build("normed")))
    merged = copy.deepcopy(model)
    merge_adapters(merged)
    found, expected = (analyze(m, [(X, Y)], PGD2) for m in (model, merged))
    assert [row.criticality for row in found.rows] == [row.criticality for row in expected.rows]


def test_a_selected_layer_trains_its_adapter_alone_where_the_weight_was_frozen():
    model = attach(build("normed"))
    for weight in originals(model).values():
        weight.requires_grad_(False)
    layers = map_layers(model, X)
    trainable = TrainableSet(model)
    trainable.select([layers.by_name("conv2")])
    ModelView(model)(X).sum().backward()
    prefix = "conv2.parametrizations.weight.0"
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {f"{prefix}.a", f"{prefix}.b", "conv2.bias"}
    trainable.restore()
    assert not originals(model)["conv1"].requires_grad
    assert all(p.requires_grad for p in adapters(model)["conv1"].parameters())


def test_the_1x1_form_computes_what_peft_computes():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for kind in ("plain", "strided", "linear"):  # it forgets dilation and padding_mode
        base = nn.Sequential(copy.deepcopy(LAYERS[kind]))
        config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["0"], lora_dropout=0.0)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        ours = moved(attach(base, rank=2, alpha=3.0, form="1x1"))
        adapter: LowRank = adapters(ours)["0"]
        layer = theirs.base_model.model[0]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.a)
            layer.lora_B["default"].weight.copy_(adapter.b.view_as(layer.lora_B["default"].weight))
        x = torch.rand(2, 4, 9, 9) if kind != "linear" else torch.rand(2, 4)
        torch.testing.assert_close(ours(x), theirs(x))
