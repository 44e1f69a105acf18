"""The view: a forward that stops early yields bit for bit what the full one does."""

import pytest
import torch

from as_found import left_as_found
from toughen.errors import InputError
from toughen.layers import ModelView, map_layers
from toughen.layers.view import samples_first
from zoo import ZOO, build, images

X = images(3)[0]


def layer_sets(name: str) -> list[tuple[str, ...]]:
    """Each measurable layer alone, and all layers but the classifier together."""
    layers = map_layers(build(name), X[:1])
    every = [layer.name for layer in layers.measurable]
    alone = every if name != "resnet18" else every[::5]
    return [*((one,) for one in alone), tuple(layer.name for layer in layers.selectable)]


CASES = [(name, layers) for name in ZOO for layers in layer_sets(name)]


@pytest.mark.parametrize(("name", "layers"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v[:2]))
def test_truncated_equals_full_bit_for_bit(name, layers):
    model = build(name).eval()
    found = []
    for stop_early in (False, True):
        x = X.clone().requires_grad_(True)
        values = ModelView(model).features(x, layers, stop_early=stop_early).values
        total = sum(value.square().sum() for value in (values[layer] for layer in layers))
        weights = list(model.parameters())
        found.append((values, torch.autograd.grad(total, [x, *weights], allow_unused=True)))
    (full, full_gradients), (truncated, truncated_gradients) = found
    assert full.keys() == truncated.keys() == set(layers)
    assert all(torch.equal(full[layer], truncated[layer]) for layer in layers)
    assert full_gradients[0].abs().sum() > 0
    for a, b in zip(full_gradients, truncated_gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_logits_are_missing_when_stopped_early_and_there_otherwise():
    model = build("backwards").eval()
    view = ModelView(model)
    assert view.features(X, ["second"], stop_early=True).logits is None
    assert torch.equal(view.features(X, ["second"]).logits, model(X))
    assert torch.equal(view.features(X, [], stop_early=True).logits, model(X))


def test_what_follows_the_last_requested_layer_does_not_run():
    model, ran = build("backwards").eval(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    ModelView(model).features(X, ["second", "first"], stop_early=True)
    assert "first" in ran
    assert not {"third", "head", "head.fc"} & set(ran)


def test_a_model_cannot_swallow_the_early_stop():
    class Careful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("backwards")

        def forward(self, x):
            try:
                return self.inner(x)
            except Exception:
                return torch.zeros(len(x), 4)

    features = ModelView(Careful().eval()).features(X, ["inner.first"], stop_early=True)
    assert features.logits is None


def test_features_are_those_before_an_in_place_change():
    model = build("in_place").eval()
    values = ModelView(model).features(X, ["conv"]).values
    assert torch.equal(values["conv"], model.conv(X))
    assert (values["conv"] < 0).any()


def test_reduce_replaces_the_feature_and_runs_inside_the_forward():
    model = build("in_place").eval()
    values = ModelView(model).features(X, ["conv"], reduce=lambda name, value: value.flatten(1).amin(dim=1)).values
    assert torch.equal(values["conv"], model.conv(X).flatten(1).amin(dim=1))
    assert (values["conv"] < 0).all()


def test_features_of_windows_have_the_batch_first():
    model = build("windowed").eval()
    by_hand = model.mix(model.windows(X))
    kept = ModelView(model).features(X, ["mix"]).values["mix"]
    reduced = ModelView(model).features(X, ["mix"], reduce=lambda _, feature: feature.sum(dim=(1, 2, 3))).values["mix"]
    assert kept.shape == (3, 4, 4, 6)
    assert torch.equal(kept, by_hand)
    assert torch.equal(reduced, by_hand.sum(dim=(1, 2, 3)))


def test_to_put_the_samples_first_copies_nothing():
    rows = torch.arange(24.0).view(6, 4).T.contiguous().T
    feature = samples_first("mix", rows, 3)
    assert feature.shape == (3, 2, 4)
    assert feature.data_ptr() == rows.data_ptr()
    assert samples_first("mix", rows, 6) is rows


@pytest.mark.parametrize(("name", "layer"), [("tuple_output", "pair"), ("tokens_first", "mix")])
def test_a_layer_without_a_feature_per_sample_is_refused(name, layer):
    with pytest.raises(InputError, match=f"layer '{layer}' does not return one tensor with the samples first.*another"):
        ModelView(build(name).eval()).features(X, [layer])


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_layer_that_never_runs_is_an_error(stop_early):
    view = ModelView(build("unused").eval())
    with pytest.raises(RuntimeError, match="layers never called in this forward: spare"):
        view.features(X, ["conv", "spare"], stop_early=stop_early)


def test_an_unknown_layer_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="unknown layer 'sekond'; did you mean 'second'"):
        ModelView(build("backwards")).features(X, ["sekond"])


@pytest.mark.parametrize("name", ZOO)
def test_looking_at_features_leaves_the_model_as_found(name):
    model = build(name).eval()
    first = map_layers(model, X[:1])[0].name
    with left_as_found(model):
        ModelView(model).features(X, [first], stop_early=True)
