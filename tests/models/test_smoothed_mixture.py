"""Two networks mixed by a weight: the formula, its extremes, what the mixing network sees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from as_found import left_as_found
from toughen.errors import InputError
from toughen.models import create
from toughen.models.adaptive_smoothing import MixtureOptions, SmoothedMixture, mix

SHAPE = (1, 8, 8)
X = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
GAMMAS = torch.tensor([-1e4, -30.0, -1.0, 0.0, 2.0, 1e4])


def network(seed: int, **settings) -> nn.Module:
    return create("small_cnn", **{"width": 2, "in_channels": 1, "seed": seed, **settings})


def learned(*, double: bool = False, **options) -> SmoothedMixture:
    g, h = network(1), network(2)
    if double:
        g, h = g.double(), h.double()
    return mix(g, h, alpha="learned", image_shape=SHAPE, options=MixtureOptions(**options))


class Says(nn.Module):
    """A mixing network, or a base network, that returns what it was told to, whatever it sees."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, _: object) -> Tensor:
        return self.values


class Never(nn.Module):
    def forward(self, _: Tensor) -> Tensor:
        raise AssertionError


# -- a constant weight --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 1])
def test_at_an_end_the_mixture_is_one_network_bit_for_bit_and_the_other_does_not_run(alpha):
    used = network(1)
    pair = (used, Never()) if alpha == 0 else (Never(), used)
    mixture = mix(*pair, alpha=alpha, options=MixtureOptions(accurate_scale=1.2, robust_scale=0.5))
    assert torch.equal(mixture(X), F.log_softmax((1.2, 0.5)[alpha] * used(X), dim=1))


def test_a_constant_weight_mixes_probabilities():
    g, h = network(1).double(), network(2).double()
    x = X.double().requires_grad_()
    out = mix(g, h, alpha=0.3, options=MixtureOptions(accurate_scale=2.0, robust_scale=0.5))(x)
    expected = torch.log(0.7 * torch.softmax(2 * g(x), 1) + 0.3 * torch.softmax(0.5 * h(x), 1))
    torch.testing.assert_close(out, expected)
    gradients = [torch.autograd.grad(value.square().sum(), x)[0] for value in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_logits_of_any_size_give_finite_log_probabilities_and_gradients():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    out = mix(Says(logits), Says(logits.flip(1)), alpha=0.5)(X)
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), logits)[0].isfinite().all()


def test_half_precision_logits_are_mixed_in_single_precision():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = mix(Says(logits), Says(-logits), alpha=0.5)(X)
    assert out.dtype == torch.float32
    assert torch.allclose(out.logsumexp(1), torch.zeros(6), atol=1e-6)


def test_the_accurate_network_may_see_larger_images():
    g, h = network(1), network(2)
    out = mix(g, h, alpha=0, options=MixtureOptions(accurate_size=12))(X)
    larger = F.interpolate(X, size=(12, 12), mode="bilinear", align_corners=False)
    assert torch.equal(out, F.log_softmax(g(larger), dim=1))


# -- a learned weight ---------------------------------------------------------------------------------


def test_a_learned_weight_lies_in_its_range_in_eval_mode_and_grows_with_gamma():
    mixture = learned(alpha_range=(0.2, 0.9), gamma_shift=0.0).eval()
    mixture.accurate = Says(torch.tensor([[0.0, 0.0]]).expand(6, 2))  # so that p_0 = 0.5 + 0.5 alpha
    mixture.robust = Says(torch.tensor([[1e3, 0.0]]).expand(6, 2))
    mixture.taps = (), ()
    mixture.mixing = Says(GAMMAS / 2)
    out = mixture.mixed(X)
    alpha = 2 * out.log_probabilities[:, 0].exp() - 1
    assert torch.allclose(out.gamma, GAMMAS)
    assert torch.allclose(alpha, 0.2 + 0.7 * torch.sigmoid(GAMMAS), atol=1e-6)
    assert (alpha.diff() > -1e-6).all()
    assert alpha[0] < alpha[3] < alpha[-1]


def test_any_gamma_gives_finite_log_probabilities_and_gradients_in_both_modes():
    mixture = learned(alpha_range=(0.0, 1.0))
    for training in (True, False):
        gammas = (GAMMAS / 2).requires_grad_()
        mixture.train(training).mixing = Says(gammas)
        out = mixture(X)
        assert torch.allclose(out.logsumexp(1), torch.zeros(6), atol=1e-6)
        assert torch.autograd.grad(out.sum(), gammas)[0].isfinite().all()


def test_train_mode_leaves_the_weight_the_whole_of_its_range():
    mixture = learned(alpha_range=(0.84, 0.99)).eval()
    gamma = mixture.mixed(X, in_range=False).gamma
    g, h = (torch.softmax(base(X), dim=1) for base in (mixture.accurate, mixture.robust))
    alpha = torch.sigmoid(gamma)[:, None]
    found = mixture.mixed(X, in_range=False).log_probabilities
    assert torch.allclose(found.exp(), (1 - alpha) * g + alpha * h, atol=1e-6)
    assert torch.allclose(mixture.mixed(X).gamma - gamma, torch.tensor(1.3 - 0.4), atol=1e-6)


def test_gradients_reach_the_image_through_both_networks_and_the_mixing_network():
    mixture = learned(double=True, alpha_range=(0.1, 0.9)).eval()
    x = X.double().requires_grad_()
    direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixture(x)[:, 3].sum(), x)
    with torch.no_grad():
        difference = mixture(x + 1e-6 * direction)[:, 3].sum() - mixture(x - 1e-6 * direction)[:, 3].sum()
    assert torch.allclose((gradient * direction).sum(), difference / 2e-6, rtol=1e-5)
    (of_gamma,) = torch.autograd.grad(mixture.mixed(x).gamma.sum(), x)
    assert (of_gamma != 0).any()


def test_both_networks_stay_in_eval_mode():
    mixture = learned().train()
    assert mixture.training
    assert mixture.mixing.training
    assert not any(module.training for base in (mixture.accurate, mixture.robust) for module in base.modules())
    assert not any(module.training for module in mixture.eval().modules())


def test_scores_far_from_the_rest_of_their_batch_are_clamped_while_training_only():
    mixture = learned()
    seen = []
    mixture.mixing.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mixture.mixing.linear = Says(torch.tensor([[0.0], [0.0], [0.0], [0.0], [0.0], [60.0]]))
    mixture.train()(X)
    mixture.eval()(X)
    given = mixture.mixing.linear.values
    assert torch.allclose(seen[0].max(), given.mean() + 0.6 * given.std())
    assert torch.equal(seen[1], given)


def test_what_the_mixing_network_sees_ends_a_third_and_two_thirds_of_a_wide_resnet():
    g = create("wrn28_10_silu", width=1, seed=0)
    mixture = mix(g, g, alpha="learned", image_shape=(3, 8, 8))
    assert mixture.taps[0] == mixture.taps[1] == ("layer.0.block.3", "layer.1.block.3")


def test_layers_can_be_named_and_features_may_be_vectors_tokens_or_maps():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(8, 5), nn.Linear(5, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x.squeeze(1)).mean(dim=1))

    options = MixtureOptions(accurate_taps=("embed", "head"), robust_taps=("layer1.0",))
    mixture = mix(Tokens(), network(2), alpha="learned", image_shape=SHAPE, options=options)
    assert mixture.taps == (("embed", "head"), ("layer1.0",))
    assert mixture(X).shape == (6, 10)


def test_making_a_mixture_changes_nothing_but_the_mode_and_its_seed_decides_the_mixing_network():
    g, h = network(1).eval(), network(2).eval()
    with left_as_found(nn.ModuleList([g, h]).eval()):
        a, b, c = (mix(g, h, alpha="learned", image_shape=SHAPE, seed=seed).mixing for seed in (0, 0, 1))
    assert torch.equal(a.linear.weight, b.linear.weight)
    assert not torch.equal(a.linear.weight, c.linear.weight)


def test_the_state_of_a_mixture_is_that_of_both_networks_and_the_mixing_network():
    mixture = learned()
    mixture(X)
    other = mix(network(3), network(4), alpha="learned", image_shape=SHAPE, seed=5)
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(mixture.eval()(X), other.eval()(X))


# -- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "learnt", None])
def test_a_weight_outside_of_0_to_1_is_refused(alpha):
    with pytest.raises(InputError, match=rf"^alpha is {alpha!r}; it must be a number in \[0, 1\], or 'learned'$"):
        mix(network(1), network(2), alpha=alpha)


def test_networks_with_other_classes_are_refused_when_they_are_met():
    pair = network(1), network(2, num_classes=7)
    with pytest.raises(InputError, match="the accurate network has 10 classes and the robust one 7"):
        mix(*pair, alpha=0.5, image_shape=SHAPE)
    with pytest.raises(InputError, match="the accurate network has 10 classes and the robust one 7"):
        mix(*pair, alpha=0.5)(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_range": (0.9, 0.9)}, r"alpha_range is \[0\.9, 0\.9\]; it must rise inside \[0, 1\]"),
        ({"alpha_range": (0.5, 1.1)}, r"alpha_range is \[0\.5, 1\.1\]"),
        ({"gamma_shift": float("inf")}, "gamma_shift is inf"),
        ({"accurate_scale": 0.0}, r"accurate_scale is 0\.0; it must be a finite number above 0"),
        ({"robust_scale": -1.0}, r"robust_scale is -1\.0"),
        ({"accurate_size": 0}, "accurate_size is 0"),
        ({"robust_taps": ()}, r"robust_taps is \[\]; name at least one layer"),
        ({"accurate_taps": ("a", "a")}, r"accurate_taps is \['a', 'a'\]"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        MixtureOptions(**options)


def test_a_learned_weight_needs_the_shape_of_the_images_and_layers_that_are_there():
    with pytest.raises(InputError, match="a learned alpha needs image_shape"):
        mix(network(1), network(2), alpha="learned")
    with pytest.raises(InputError, match=r"unknown layer 'layer9'"):
        learned(accurate_taps=("layer9",))


def test_a_constant_weight_takes_no_settings_of_a_learned_one():
    with pytest.raises(InputError, match=r"alpha_range is \(0\.0, 1\.0\), which means nothing for a constant alpha"):
        mix(network(1), network(2), alpha=0.5, options=MixtureOptions(alpha_range=(0.0, 1.0)))


def test_images_that_a_network_does_not_take_are_refused_in_one_line():
    with pytest.raises(InputError, match="images have 3 channels, the model was built for 1"):
        mix(network(1), network(2), alpha="learned", image_shape=(3, 8, 8))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(
        InputError, match="the network Sequential of a mixture does not take 9x9 images with 1 channels"
    ):
        mix(flat, flat, alpha=0.5, image_shape=(1, 9, 9))
