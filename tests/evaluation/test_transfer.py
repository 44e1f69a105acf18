import pytest
import torch
from torch import Tensor, nn

from as_found import left_as_found
from toughen import ThreatModel
from toughen.errors import InputError
from toughen.evaluation import EvalAttack, evaluate, parse_attack, transfer, transfer_from
from zoo import build, images

THREAT = ThreatModel(eps=0.1)


class Half(nn.Module):
    """Says class 1 where the left (or the right) half of the image is brighter than one half."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part
        self.gain = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        margin = self.gain * (x[..., self.part].flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


LEFT, RIGHT, WHOLE = Half(slice(0, 2)), Half(slice(2, 4)), Half(slice(0, 4))


def greys() -> list[tuple[Tensor, Tensor]]:
    levels = torch.tensor([0.2, 0.46, 0.54, 0.9])
    return [(levels[:, None, None, None].expand(4, 1, 4, 4).clone(), torch.tensor([0, 0, 1, 0]))]


def pgd(threat: ThreatModel = THREAT, steps: int = 10) -> EvalAttack:
    return parse_attack(f"pgd-{steps}", threat=threat, step_size=threat.eps / 2)


FGSM = parse_attack("fgsm", threat=THREAT, step_size=0.1)  # no random start, which would move every pixel


def test_images_made_on_one_half_do_nothing_to_the_other_and_half_to_the_whole():
    matrix = transfer({"left": LEFT, "right": RIGHT, "whole": WHOLE}, greys(), FGSM)
    assert matrix.names == ("left", "right", "whole")
    # the last sample is wrong when clean
    assert matrix.clean == ((True, True, True, False),) * 3
    # the two in the middle fall where their half is moved, and where the mean of both halves moves by 0.05
    fallen, untouched = (True, False, False, False), (True, True, True, False)
    assert matrix.correct[0][:2] == (fallen, untouched)
    assert matrix.correct[1][:2] == (untouched, fallen)
    assert matrix.correct[2] == (fallen, fallen, fallen)


def test_what_is_made_on_one_model_is_its_row_of_the_matrix():
    matrix = transfer({"left": LEFT, "right": RIGHT, "whole": WHOLE}, greys(), FGSM)
    row = transfer_from(WHOLE, {"left": LEFT, "whole": WHOLE}, greys(), FGSM)
    assert row == {"left": matrix.correct[2][0], "whole": matrix.correct[2][2]}
    with pytest.raises(InputError, match="at least one model, and an attack other than clean"):
        transfer_from(WHOLE, {}, greys(), FGSM)


def test_the_diagonal_is_the_white_box_result():
    model = build("nested").eval()
    x, y = images(30, seed=2)
    other = build("nested", seed=5)
    y = torch.where(torch.arange(30) < 20, model(x).argmax(dim=1), y)
    attack = pgd(ThreatModel(eps=0.02), 3)
    matrix = transfer({"a": model, "b": other}, [(x[:13], y[:13]), (x[13:], y[13:])], attack, seed=4)
    alone = evaluate(model, [(x[:13], y[:13]), (x[13:], y[13:])], [attack], seed=4, attack_all=True)[attack.name]
    assert matrix.correct[0][0] == alone.correct


def test_the_diagonal_of_a_suite_is_the_white_box_result_even_where_a_batch_decides():
    class Centred(Half):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean() + 0.5)  # as rounding does, the other images make a difference

    model = Centred(slice(0, 4))
    suite = EvalAttack("suite", (("once", FGSM.attack), ("twice", FGSM.attack)))
    matrix = transfer({"a": model, "b": LEFT}, greys(), suite)
    alone = evaluate(model, greys(), [suite], sanity=False)["suite"]
    assert matrix.correct[0][0] == alone.correct == (True, False, True, False)


def test_a_single_attack_perturbs_also_what_its_own_model_gets_wrong():
    x, y = greys()[0]
    inverted = 1 - y
    matrix = transfer({"left": LEFT, "whole": WHOLE}, [(x[1:3], inverted[1:3])], pgd())
    assert matrix.accuracy == [[0, 0], [0, 0]]
    seen = torch.tensor([0.54, 0.46])[:, None, None, None].expand(2, 1, 4, 4).clone()

    class Opposite(Half):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(1)

    # the opposite model is wrong on both; what is made on it must still change what the other is shown
    matrix = transfer({"opposite": Opposite(slice(0, 4)), "whole": WHOLE}, [(seen, torch.tensor([1, 0]))], pgd())
    assert matrix.clean == ((False, False), (True, True))
    assert matrix.correct[0][1] == (True, True)  # its gradient points the other way: they become clearer


def test_a_suite_hands_on_only_what_broke_its_model():
    search = FGSM.attack
    suite = EvalAttack("suite", (("once", search), ("twice", search)))
    matrix = transfer({"left": LEFT, "whole": WHOLE}, greys(), suite)
    alone = evaluate(LEFT, greys(), [suite])["suite"]
    assert matrix.correct[0][0] == alone.correct
    assert matrix.correct[0][1] == (True, False, False, False)


def test_models_are_left_as_found():
    first, second = build("nested"), build("nested", seed=1)
    with left_as_found(first), left_as_found(second):
        transfer({"a": first, "b": second}, [images(4)], pgd())


def test_plain_values_hold_the_matrix_and_every_sample():
    content = transfer({"left": LEFT, "right": RIGHT}, greys(), FGSM).to_dict()
    assert content["accuracy"] == [[0.25, 0.75], [0.75, 0.25]]
    assert content["correct"][0][1] == [1, 1, 1, 0]
    assert (content["n"], content["clean_accuracy"], content["names"]) == (4, [0.75, 0.75], ["left", "right"])


def test_nothing_to_transfer_is_refused():
    with pytest.raises(InputError, match="at least one model"):
        transfer({}, greys(), pgd())
    with pytest.raises(InputError, match="an attack other than clean"):
        transfer({"left": LEFT}, greys(), EvalAttack("clean"))
