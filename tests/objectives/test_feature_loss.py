"""L_C of Eq. 5 by hand, and what its options cut out of the gradient."""

import pytest
import torch

from as_found import left_as_found
from toughen.layers import ModelView
from toughen.objectives import feature_loss
from zoo import build, images

X, Y = images(5)
X_ADV = X + 0.05
LAYERS = ("first", "third")


def by_weight(model, loss):
    """The gradient of each weight, zeros where there is none."""
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip(names, found, strict=True))


def by_hand(model, layers=LAYERS):
    values = [ModelView(model).features(x, layers).values for x in (X, X_ADV)]
    return sum((values[1][name] - values[0][name]).flatten(1).norm(dim=1).mean() for name in layers)


def test_it_is_the_mean_over_images_of_the_sum_over_layers():
    model = build("backwards")
    torch.testing.assert_close(feature_loss(ModelView(model), X, X_ADV, LAYERS), by_hand(model))


def test_its_gradient_is_that_of_eq_5():
    model = build("backwards")
    found = by_weight(model, feature_loss(ModelView(model), X, X_ADV, LAYERS))
    expected = by_weight(model, by_hand(model))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer_grad", ["flow", "own"])
@pytest.mark.parametrize("clean_grad", ["keep", "detach"])
def test_truncated_and_full_give_bit_the_same_loss_and_gradient(layer_grad, clean_grad):
    model = build("backwards")
    found = []
    for stop_early in (True, False):
        options = {"layer_grad": layer_grad, "clean_grad": clean_grad, "stop_early": stop_early}
        loss = feature_loss(ModelView(model), X, X_ADV, ("first", "second"), **options)
        found.append((loss, *by_weight(model, loss).values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_given_clean_features_change_nothing():
    model = build("backwards")
    clean = ModelView(model).features(X, LAYERS).values
    found = [feature_loss(ModelView(model), X, X_ADV, LAYERS, clean=given) for given in (clean, None)]
    assert torch.equal(*found)
    gradients = [by_weight(model, loss) for loss in found]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_detached_clean_features_are_constants_in_the_gradient():
    model = build("backwards")
    view = ModelView(model)
    constant = {name: value.detach() for name, value in view.features(X, LAYERS).values.items()}
    moved = view.features(X_ADV, LAYERS).values
    expected = by_weight(model, sum((moved[n] - constant[n]).flatten(1).norm(dim=1).mean() for n in LAYERS))
    for clean in (None, view.features(X, LAYERS).values):
        found = by_weight(model, feature_loss(view, X, X_ADV, LAYERS, clean=clean, clean_grad="detach"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    kept = by_weight(model, feature_loss(view, X, X_ADV, LAYERS))
    assert not torch.allclose(kept["third.weight"], expected["third.weight"], rtol=0.05)


@pytest.mark.parametrize("clean_grad", ["keep", "detach"])
def test_own_gradients_reach_only_the_layer_whose_term_it_is(clean_grad):
    model = build("backwards")
    view = ModelView(model)
    own = by_weight(model, feature_loss(view, X, X_ADV, LAYERS, layer_grad="own", clean_grad=clean_grad))
    alone = by_weight(model, feature_loss(view, X, X_ADV, ["first"], clean_grad=clean_grad))
    flow = by_weight(model, feature_loss(view, X, X_ADV, LAYERS, clean_grad=clean_grad))
    torch.testing.assert_close(own["first.weight"], alone["first.weight"])
    assert not torch.allclose(own["first.weight"], flow["first.weight"])
    torch.testing.assert_close(own["third.weight"], flow["third.weight"])
    assert own["second.weight"].abs().sum() == 0
    assert flow["second.weight"].abs().sum() > 0


def test_own_gradients_work_for_layers_called_by_keyword():
    model = build("by_keyword")
    own = by_weight(model, feature_loss(ModelView(model), X, X_ADV, ["conv", "fc"], layer_grad="own"))
    alone = by_weight(model, feature_loss(ModelView(model), X, X_ADV, ["conv"]))
    torch.testing.assert_close(own["conv.weight"], alone["conv.weight"])


@pytest.mark.parametrize("layer_grad", ["flow", "own"])
def test_the_loss_does_not_depend_on_where_its_gradient_goes(layer_grad):
    model = build("backwards")
    loss = feature_loss(ModelView(model), X, X_ADV, LAYERS, layer_grad=layer_grad)
    torch.testing.assert_close(loss, by_hand(model))


def test_no_hook_is_left_behind():
    model = build("backwards")
    with left_as_found(model):
        feature_loss(ModelView(model), X, X_ADV, LAYERS, layer_grad="own")
    with left_as_found(model), pytest.raises(RuntimeError):
        feature_loss(ModelView(model), X, X_ADV[:, :2], LAYERS, layer_grad="own")
