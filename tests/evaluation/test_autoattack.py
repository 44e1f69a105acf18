"""The attacks of AutoAttack: outcomes of the published package, on any model, which stays as found."""

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from as_found import disturb, left_as_found
from toughen.errors import InputError
from toughen.evaluation.autoattack import APGD, FAB, Published, Square, TargetedAPGD, TargetedFAB, paper, standard
from toughen.types import Norm, ThreatModel

LINF = ThreatModel(norm="linf", eps=0.1)
L2 = ThreatModel(norm="l2", eps=0.5)
THREATS: dict[Norm, ThreatModel] = {"linf": LINF, "l2": L2}


def pixels(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(4, *shape, generator=torch.Generator().manual_seed(2))


def network(num_classes: int = 10, *, shape: tuple[int, ...] = (3, 8, 8)) -> nn.Module:
    """A small network that prefers no class on average over the images, so that each is near a boundary."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        body = [nn.Conv2d(shape[0], 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
        last = nn.Linear(6 * 9, num_classes)
        model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(3), nn.Flatten(), last).eval()
        last.bias -= model(pixels(shape)).mean(dim=0)
    return model


def images(model: nn.Module, *, shape: tuple[int, ...] = (3, 8, 8)) -> tuple[Tensor, Tensor]:
    """Images, and what the model says of them."""
    x = pixels(shape)
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wrong(model: nn.Module, x: Tensor, y: Tensor) -> list[bool]:
    with torch.no_grad():
        return (model(x).argmax(dim=1) != y).tolist()


def each_briefly(threat: ThreatModel) -> list[Published]:
    return [
        APGD(threat=threat, steps=5),
        APGD(threat=threat, loss="dlr", steps=5, restarts=2),
        TargetedAPGD(threat=threat, steps=5),
        FAB(threat=threat, steps=5),
        TargetedFAB(threat=threat, steps=5, restarts=2),
        Square(threat=threat, queries=20, restarts=2),
    ]


class TestPublished:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize(
        ("name", "attack"),
        [
            ("apgd-ce", partial(APGD)),
            ("apgd-dlr", partial(APGD, loss="dlr")),
            ("apgd-t", partial(TargetedAPGD, targets=2)),
            ("fab", partial(FAB, steps=10)),
            ("fab-t", partial(TargetedFAB, targets=2, steps=10)),
            ("square", partial(Square, queries=100)),
        ],
    )
    def test_each_attack_returns_what_autoattack_returns_bit_for_bit(self, name: str, attack: Any, norm: Norm) -> None:
        model = network()
        x, y = images(model)
        y[1] = (y[1] + 1) % 10  # AutoAttack leaves alone what is wrong already
        # image 2 is farther from any boundary, the others nearer; squares find it at twice its distance
        eps = {"linf": 0.012, "l2": 0.12}[norm] * (2 if name == "square" else 1)
        theirs = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=11, version="standard")
        theirs.attacks_to_run = [name]
        theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 2
        theirs.fab.n_iter = 10
        theirs.square.n_queries = 100
        expected, _ = theirs.run_standard_evaluation(x, y)

        found = attack(threat=ThreatModel(norm=norm, eps=eps))(model, x, y, generator=seeded(11))

        fell = (found != x).flatten(1).any(dim=1).tolist()
        assert torch.equal(found, expected)
        assert fell[1:3] == [False, False]
        assert True in fell

    def test_standard_has_the_published_settings(self) -> None:
        settings = {name: asdict(attack) | {"threat": None} for name, attack in standard(LINF)}

        assert settings == {
            "apgd-ce": {"threat": None, "loss": "ce", "steps": 100, "restarts": 1},
            "apgd-t": {"threat": None, "targets": 9, "steps": 100, "restarts": 1},
            "fab-t": {"threat": None, "targets": 9, "steps": 100, "restarts": 1},
            "square": {"threat": None, "queries": 5000, "p_init": 0.8, "restarts": 1},
        }

    def test_the_papers_setting_differs_from_standard_in_the_targets_of_fab_alone(self) -> None:
        theirs, ours = dict(standard(L2)), dict(paper(L2))

        assert list(ours) == list(theirs)
        assert ours.pop("fab-t") == replace(theirs.pop("fab-t"), targets=3)
        assert ours == theirs

    def test_the_seed_is_the_generators_and_any_seed_will_do(self) -> None:
        model = network()
        x, y = images(model)
        attack = APGD(threat=LINF, steps=3)
        generator = seeded(2**64 - 1)
        before = generator.get_state()

        first = attack(model, x, y, generator=generator)

        assert torch.equal(generator.get_state(), before)
        assert torch.equal(attack(model, x, y, generator=generator), first)
        assert not torch.equal(attack(model, x, y, generator=seeded(0)), first)


class TestPurity:
    @pytest.mark.parametrize("attack", each_briefly(LINF) + each_briefly(L2)[-1:], ids=lambda a: type(a).__name__)
    def test_the_model_is_attacked_in_eval_mode_and_all_stays_as_found(self, attack: Published) -> None:
        class Drifts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = network()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.calls += torch.rand(())
                return self.body(x)

        model = Drifts()
        x, y = images(network())
        given = x.clone()
        # the model's draws are among the library's
        expected = attack(model.eval(), x, y, generator=seeded(0))
        disturb(model)

        with left_as_found(model):
            x_adv = attack(model, x, y, generator=seeded(0))

        assert torch.equal(x_adv, expected)
        assert not x_adv.requires_grad
        assert torch.equal(x, given)

    def test_square_does_not_write_into_what_the_model_returns(self) -> None:
        class Remembers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.logits[: len(x)]

        model = Remembers()
        x, y = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)

        Square(threat=LINF, queries=3)(model, x, y, generator=seeded(0))

        assert model.logits.tolist() == [[2.0, 1.0, 0.0]] * 4

    def test_the_library_says_nothing_where_gradients_vanish(
        self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Hardtanh(-1e-9, 1e-9)).eval()
        x, y = images(model)

        with caplog.at_level(logging.DEBUG):
            for attack in each_briefly(LINF):
                attack(model, x, y, generator=seeded(0))

        assert capfd.readouterr() == ("", "")
        assert not caplog.records


class TestAnyModel:
    @pytest.mark.parametrize("num_classes", [2, 3, 4])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_few_classes_are_attacked_by_all(self, norm: Norm, num_classes: int) -> None:
        model = network(num_classes)
        x, y = images(model)
        threat = THREATS[norm]

        for attack in each_briefly(threat):
            x_adv = attack(model, x, y, generator=seeded(0))

            delta = (x_adv - x).flatten(1)
            length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
            assert (length < threat.eps * 1.00001).all()
            assert x_adv.min() >= 0
            assert x_adv.max() <= 1
            if not isinstance(attack, Square):
                assert all(wrong(model, x_adv, y)), attack
            hopeless = replace(attack, threat=replace(threat, eps=1e-6))  # so that all targets are tried
            assert torch.equal(hopeless(model, x, y, generator=seeded(0)), x)

    @pytest.mark.parametrize("num_images", [0, 1])
    def test_one_image_and_none_are_fine(self, num_images: int) -> None:
        model = network()
        x, y = images(model)

        for attack in each_briefly(LINF):
            assert attack(model, x[:num_images], y[:num_images], generator=seeded(0)).shape == x[:num_images].shape

    def test_images_that_are_wrong_already_come_back_unchanged(self) -> None:
        model = network()
        x, y = images(model)

        for attack in each_briefly(LINF):
            assert torch.equal(attack(model, x, (y + 1) % 10, generator=seeded(0)), x)

    def test_without_a_budget_nothing_changes_and_the_model_is_not_asked(self) -> None:
        class Silent(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise AssertionError

        x, y = images(network())

        for attack in each_briefly(ThreatModel(norm="l2", eps=0)):
            assert torch.equal(attack(Silent(), x, y, generator=seeded(0)), x)

    def test_restarts_search_again_where_images_stand(self) -> None:
        def asked(attack: Published) -> int:
            model = network()
            x, y = images(model)
            calls = []
            model.register_forward_hook(lambda *_: calls.append(1))
            attack(model, x, y, generator=seeded(0))
            return len(calls)

        for attack in each_briefly(ThreatModel(eps=1e-6)):
            assert asked(replace(attack, restarts=3)) > 2 * asked(replace(attack, restarts=1))

    @pytest.mark.parametrize(
        ("norm", "shape"),
        [("linf", (1, 6, 11)), ("l2", (3, 14, 14)), ("l2", (1, 28, 17)), ("l2", (3, 3, 4)), ("l2", (1, 8, 8))],
    )
    def test_square_breaks_images_of_any_shape_within_the_ball(self, norm: Norm, shape: tuple[int, ...]) -> None:
        model = network(3, shape=shape)
        x, y = images(model, shape=shape)
        eps = {"linf": 0.3, "l2": 3.0}[norm]

        x_adv = Square(threat=ThreatModel(norm=norm, eps=eps), queries=100)(model, x, y, generator=seeded(0))

        delta = (x_adv - x).flatten(1)
        length = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
        assert x_adv.shape == x.shape
        assert True in wrong(model, x_adv, y)
        assert (length < eps * 1.00001).all()

    def test_ties_of_logits_do_not_make_square_ask_about_no_image(self) -> None:
        class Ties(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(len(x), -1)[:, :2] * 0  # a view with -1 refuses an empty batch

        x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)

        assert torch.equal(Square(threat=LINF, queries=3)(Ties(), x, y, generator=seeded(0)), x)

    @pytest.mark.parametrize("attack", each_briefly(LINF), ids=lambda a: type(a).__name__)
    def test_images_may_be_double_or_channels_last(self, attack: Published) -> None:
        model = network()
        x, y = images(model)
        expected = attack(model, x, y, generator=seeded(0))
        layout = x.to(memory_format=torch.channels_last)

        double = attack(network().double(), x.double(), y, generator=seeded(0))

        torch.testing.assert_close(attack(model, layout, y, generator=seeded(0)), expected)
        assert double.dtype == torch.float64


class TestRemarks:
    def test_ten_classes_and_square_images_leave_nothing_to_remark(self) -> None:
        attacks = [attack for threat in THREATS.values() for _, attack in standard(threat)]

        assert [attack.remarks(10, (3, 32, 32)) for attack in attacks] == [()] * 8

    @pytest.mark.parametrize(
        ("attack", "num_classes", "remarks"),
        [
            (APGD(threat=LINF), 2, ()),
            (APGD(threat=LINF, loss="dlr"), 3, ()),
            (
                APGD(threat=LINF, loss="dlr"),
                2,
                ("the DLR loss needs 3 classes and there are 2: APGD maximises the margin instead",),
            ),
            (
                TargetedAPGD(threat=LINF, targets=2),
                3,
                (
                    "the targeted DLR loss needs 4 classes and there are 3: "
                    "APGD-T maximises the margin to the target instead",
                ),
            ),
            (
                TargetedAPGD(threat=LINF),
                4,
                ("APGD-T aims at 3 wrong classes instead of 9: there are 4 classes",),
            ),
            (TargetedFAB(threat=LINF), 9, ("FAB-T aims at 8 wrong classes instead of 9: there are 9 classes",)),
            (FAB(threat=LINF), 2, ()),
        ],
    )
    def test_few_classes_are_remarked(self, attack: Published, num_classes: int, remarks: tuple[str, ...]) -> None:
        assert attack.remarks(num_classes, (3, 32, 32)) == remarks

    @pytest.mark.parametrize(
        ("threat", "shape", "remarks"),
        [
            (LINF, (3, 14, 14), ()),
            (LINF, (3, 48, 64), ("Square is published for square images; on 48 x 64 it may be weaker",)),
            (
                L2,
                (3, 14, 14),
                (
                    "Square in l2 can't lay its first tiles on 14 x 14: "
                    "it searches on 15 x 15, of which the model sees the image",
                ),
            ),
        ],
    )
    def test_shapes_that_square_is_not_made_for_are_remarked(
        self, threat: ThreatModel, shape: tuple[int, ...], remarks: tuple[str, ...]
    ) -> None:
        assert Square(threat=threat).remarks(10, shape) == remarks


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "settings", "message"),
        [
            (APGD, {"steps": 0}, "APGD steps is 0; it must be at least 1"),
            (APGD, {"loss": "dl"}, r"unknown APGD loss 'dl'; did you mean 'dlr'\? Allowed: ce, dlr"),
            (TargetedAPGD, {"targets": 0}, "TargetedAPGD targets is 0; it must be at least 1"),
            (FAB, {"restarts": 0}, "FAB restarts is 0; it must be at least 1"),
            (TargetedFAB, {"targets": -1}, "TargetedFAB targets is -1; it must be at least 1"),
            (Square, {"queries": 0}, "Square queries is 0; it must be at least 1"),
            (Square, {"p_init": 0.0}, r"Square p_init is 0.0; it must be in \(0, 1\], a share of the pixels"),
            (
                Square,
                {"threat": ThreatModel(eps=8, bounds=(0, 255))},
                r"Square takes images in \[0, 1\] only; bounds are \(0, 255\): rescale the images",
            ),
        ],
    )
    def test_settings_out_of_range_are_refused(self, make: Any, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=f"^{message}$"):
            make(**({"threat": LINF} | settings))
