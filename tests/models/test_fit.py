import pytest
import torch
from torch import nn

from small_runs import recipe
from toughen.engine import Trainer
from toughen.errors import InputError
from toughen.models import check_fit, create


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            create("small_cnn", num_classes=3, in_channels=1),
            "the model has 3 classes and the data 10; build it with num_c",
        ),
        (create("small_cnn", in_channels=3), "images have 1 channels, the model was built for 3"),
        (
            create("timm/test_vit", num_classes=10, in_channels=1),
            r"Sequential fails on 8x8 images with 1 channels: AssertionError: ",
        ),
        (Pair(), r"the model returns tuple for one image; it must return logits \[1, 10\]"),
        (nn.Conv2d(1, 10, 1), r"a tensor of shape \[1, 10, 8, 8\] for one image; it must return logits \[1, 10\]"),
    ],
)
def test_a_model_that_does_not_suit_the_data_is_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_fit(model, image_shape=(1, 8, 8), num_classes=10)
    assert "\n" not in str(error.value)


def test_the_model_is_left_as_found() -> None:
    model = create("small_cnn", in_channels=1, seed=0)
    model.layer1.eval()  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    check_fit(model, image_shape=(1, 8, 8), num_classes=10)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_of_the_users_own_is_tried_before_a_run_folder_is_made(tmp_path) -> None:
    with pytest.raises(InputError, match="the model has 3 classes and the data 10"):
        Trainer(recipe(), out=tmp_path / "run", model=create("small_cnn", num_classes=3, in_channels=1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mean": (125.0,), "std": (60.0,)},
            r"mean is \(125\.0,\); it is for pixels in \[0, 1\], so divide",
        ),
        ({"classifier": "junk"}, "unknown classifier 'junk'"),
        ({"classifier": "new"}, "classifier is 'new', which means something only beside weights"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(given, message) -> None:
    with pytest.raises(InputError, match=message):
        create("small_cnn", in_channels=1, **given)
