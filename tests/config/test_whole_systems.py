"""The recipes of whole systems say what was published."""

from dataclasses import replace

import pytest

from toughen.config import load_recipe
from toughen.methods import CLAT, EMA
from toughen.objectives import TRADES


def test_wang_2023_has_the_settings_of_the_official_code_for_a_million_images():
    recipe = load_recipe("wang2023_wrn28_10")
    train, (trades, ema) = recipe.train, recipe.method.methods
    assert recipe.model.name == "wrn28_10_silu"
    assert (recipe.data.validation, recipe.data.extra.fraction) == (1024, 0.7)
    assert (recipe.threat.norm, recipe.threat.eps) == ("linf", 8 / 255)
    assert (recipe.attack.step_size, recipe.attack.steps, recipe.attack.model_mode) == (2 / 255, 10, "unchanged")
    assert trades == TRADES(beta=5.0, label_smoothing=0.1, start="attack")
    assert ema == EMA(decay=0.995, start_epoch=10)
    assert (train.epochs, train.batch_size, train.lr, train.nesterov) == (400, 512, 0.2, True)
    assert (train.schedule, train.peak, train.weight_decay, train.norm_decay) == ("onecycle", 0.025, 5e-4, "exclude")


def test_peng_2023_is_wang_2023_with_another_network():
    wang, peng = load_recipe("wang2023_wrn28_10"), load_recipe("peng2023_rawrn70_16")
    assert peng.model.name == "rawrn70_16"
    assert replace(peng, model=wang.model, description="", branches=wang.branches) == replace(wang, description="")


@pytest.mark.parametrize(("name", "excluded"), [("wang2023_wrn28_10", ()), ("peng2023_rawrn70_16", ("*.se.*",))])
def test_each_goes_on_with_clat_and_without_from_one_checkpoint(name, excluded):
    recipe = load_recipe(name)
    assert recipe.branches["trades"].method == recipe.method
    trades, clat, ema = recipe.branches["clat"].method.methods
    assert trades == recipe.method.methods[0]
    assert isinstance(clat, CLAT)
    assert (clat.base, clat.lam, clat.criticality.exclude) == ("inner", 0, excluded)
    assert isinstance(ema, EMA)
