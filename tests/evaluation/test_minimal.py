"""Carlini and Wagner's attack through the optional foolbox."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen.errors import InputError
from toughen.evaluation.minimal import CarliniWagner
from toughen.types import ThreatModel

L2 = ThreatModel(norm="l2", eps=0.5)


class Fold(nn.Module):
    """Logits (s, 0) with s the mean of the pixels less 0.4, so that class 0 ends at a mean of 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, eps=0)
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.drift += torch.rand(())
        mean = 100 * (self.norm(x).mean(dim=(1, 2, 3)) - 0.4)
        return torch.stack((mean, torch.zeros_like(mean)), dim=1)


def model_and_images() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.full((3, 1, 4, 4), 0.5)
    x[1] = 0.42
    return Fold().eval(), x, torch.zeros(3, dtype=torch.long)


def attacked(attack: CarliniWagner, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attack(model, x, y, generator=torch.Generator())


@pytest.fixture
def _foolbox() -> None:
    pytest.importorskip("foolbox", reason="foolbox is optional: pip install 'toughen[attacks]'")


@pytest.mark.usefixtures("_foolbox")
class TestCarliniWagner:
    def test_each_image_moves_just_over_its_own_boundary_also_beyond_eps(self) -> None:
        model, x, y = model_and_images()
        attack = CarliniWagner(threat=ThreatModel(norm="l2", eps=0.1), steps=60, initial_const=0.1)

        x_adv = attacked(attack, model, x, y)

        assert model(x_adv).argmax(dim=1).tolist() == [1, 1, 1]
        nearest = torch.tensor([0.4, 0.08, 0.4])  # the mean falls by 0.1 (0.02): 4 times that in l2
        torch.testing.assert_close((x_adv - x).flatten(1).norm(dim=1), nearest, rtol=0.01, atol=0)

    def test_confidence_is_the_margin_by_which_the_model_errs(self) -> None:
        model, x, y = model_and_images()
        attack = CarliniWagner(threat=L2, steps=60, confidence=5.0, initial_const=0.1)

        logits = model(attacked(attack, model, x, y))

        torch.testing.assert_close(logits[:, 1] - logits[:, 0], torch.full((3,), 5.0), rtol=0, atol=0.2)

    def test_an_image_for_which_nothing_is_found_comes_back_unchanged(self) -> None:
        model, x, y = model_and_images()
        attack = CarliniWagner(threat=L2, steps=2, binary_search_steps=1)

        assert torch.equal(attacked(attack, model, x, y), x)  # foolbox's answer, an image of zeros, would be an error

    def test_the_model_is_attacked_in_eval_mode_and_all_stays_as_found(self) -> None:
        model, x, y = model_and_images()
        attack = CarliniWagner(threat=L2, steps=20, initial_const=1.0, binary_search_steps=2)
        expected = attacked(attack, model, x, y)
        disturb(model)
        model.norm.train()

        with left_as_found(model):
            x_adv = attacked(attack, model, x, y)

        assert not torch.equal(expected, x)
        assert torch.equal(x_adv, expected)
        assert not x_adv.requires_grad

    def test_no_image_an_image_beyond_the_box_by_rounding_and_one_that_is_wrong_already(self) -> None:
        model, x, y = model_and_images()
        attack = CarliniWagner(threat=L2, steps=3, binary_search_steps=2)
        x[0] = 1 + 1e-7
        y[2] = 1

        assert attacked(attack, model, x[:0], y[:0]).shape == (0, 1, 4, 4)
        torch.testing.assert_close(attacked(attack, model, x, y)[[0, 2]], x[[0, 2]])


def test_without_foolbox_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    model, x, y = model_and_images()

    with pytest.raises(InputError, match=r"needs foolbox \(.*\); install it with pip install 'toughen\[attacks\]'$"):
        attacked(CarliniWagner(threat=L2), model, x, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"threat": ThreatModel(norm="linf", eps=0.1)},
            "CarliniWagner minimises l2 norms; the threat model is linf: use norm l2",
        ),
        ({"steps": 0}, "CarliniWagner steps is 0; it must be at least 1"),
        ({"binary_search_steps": 0}, "CarliniWagner binary_search_steps is 0; it must be at least 1"),
        ({"step_size": 0.0}, "CarliniWagner step_size is 0.0; it must be a finite number > 0"),
        ({"initial_const": float("inf")}, "CarliniWagner initial_const is inf; it must be a finite number > 0"),
        ({"confidence": -1.0}, "CarliniWagner confidence is -1.0; it must be a finite number >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        CarliniWagner(**({"threat": L2} | settings))
