"""The layer map: which layers, in which order, and what is said about the odd ones."""

import pytest
import torch
from torch import nn

from as_found import disturb, left_as_found
from toughen import models
from toughen.errors import InputError
from toughen.layers import LayerMap, map_layers
from zoo import EVERY, build, images

X = images(1)[0]


def names(layers: LayerMap) -> list[str]:
    return [layer.name for layer in layers]


def test_layers_come_in_order_of_first_execution_not_of_definition():
    layers = map_layers(build("backwards"), X)
    assert names(layers) == ["first", "second", "third", "head.fc"]
    assert [layer.index for layer in layers] == [0, 1, 2, 3]


def test_names_are_qualified_at_any_depth():
    assert names(map_layers(build("nested"), X)) == ["stem.0.0", "blocks.a.0", "blocks.a.1", "head.fc"]


def test_num_features_and_num_inputs_count_the_elements_of_one_sample():
    layers = map_layers(build("nested"), images(3)[0])
    assert [layer.num_features for layer in layers] == [4 * 8 * 8, 6 * 6 * 6, 6 * 4 * 4, 4]
    assert [layer.num_inputs for layer in layers] == [3 * 8 * 8, 4 * 8 * 8, 6 * 6 * 6, 6]


def test_a_layer_owns_its_weight_and_its_bias_and_no_batch_norm():
    conv1, conv2 = map_layers(build("normed"), X)[:2]
    assert conv1.parameters == ("conv1.weight",)
    assert conv2.parameters == ("conv2.weight", "conv2.bias")
    assert conv1.num_parameters == 4 * 3 * 9
    assert conv2.num_parameters == 4 * 4 * 9 + 4


def test_the_norm_of_a_layer_is_the_batch_norm_that_takes_its_output_directly():
    layers = map_layers(build("normed"), X)
    assert [layer.norm for layer in layers] == ["bn1", None, None, None]


def test_layers_and_norms_called_by_keyword_are_seen_like_others():
    layers = map_layers(build("by_keyword"), X)
    assert [(layer.name, layer.norm, layer.num_inputs) for layer in layers] == [("conv", "bn", 192), ("fc", None, 4)]


def test_only_the_layer_that_returns_the_logits_is_the_classifier():
    layers = map_layers(build("backwards"), X)
    assert [layer.classifier for layer in layers] == [False, False, False, True]
    headless = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.AdaptiveAvgPool1d(4))
    assert not map_layers(headless, X)[0].classifier


def test_selectable_leaves_out_the_classifier_and_what_runs_twice():
    layers = map_layers(build("called_twice"), X)
    assert [layer.name for layer in layers.measurable] == ["first", "head.fc"]
    assert [layer.name for layer in layers.selectable] == ["first"]


def test_a_layer_that_runs_twice_is_counted_and_reported():
    layers = map_layers(build("called_twice"), X)
    assert [layer.num_calls for layer in layers] == [1, 2, 1]
    assert layers.repeated == ("again",)
    assert "again: runs more than once per forward, so has no single feature" in layers.notes()


def test_a_module_under_two_names_is_one_layer_and_reported_as_shared():
    layers = map_layers(build("called_twice"), X)
    assert layers.shared == (("again", "alias"),)
    assert "again = alias: share a module or a weight, so train together" in layers.notes()


def test_two_layers_with_one_weight_are_reported_as_shared():
    layers = map_layers(build("tied"), X)
    assert names(layers) == ["a", "b", "head.fc"]
    assert layers.shared == (("a", "b"),)


def test_a_layer_that_never_runs_is_reported_and_gets_no_index():
    layers = map_layers(build("unused"), X)
    assert layers.unseen == ("spare",)
    assert names(layers) == ["conv", "head.fc"]
    assert "spare: owns weights but was never called in the forward" in layers.notes()


def test_a_layer_that_returns_a_tuple_is_reported_and_gets_no_index():
    layers = map_layers(build("tuple_output"), X)
    assert layers.tuples == ("pair",)
    assert names(layers) == ["conv", "head.fc"]
    assert layers[1].index == 1
    assert any(note.startswith("pair: ") for note in layers.notes())


def test_a_layer_whose_output_does_not_start_with_the_samples_has_no_feature():
    layers = map_layers(build("tokens_first"), X)
    assert layers.tuples == ("mix",)
    assert names(layers) == ["patches", "fc"]


def test_attention_is_reported_as_unmeasured_with_its_uncalled_projection():
    layers = map_layers(build("attention"), X)
    assert names(layers) == ["patches", "fc"]
    assert layers.others == ("attention",)
    assert layers.unseen == ("attention.out_proj",)


def test_a_model_without_oddities_has_no_notes():
    assert map_layers(build("normed"), X).notes() == []


def test_patterns_exclude_layers_and_indices_count_what_remains():
    layers = map_layers(build("backwards"), X, exclude=["sec*", "head.*"])
    assert [(layer.index, layer.name) for layer in layers] == [(0, "first"), (1, "third")]


def test_an_excluded_layer_is_not_reported_as_odd():
    assert map_layers(build("backwards"), X, exclude=["second"]).notes() == []


@pytest.mark.parametrize("pattern", ["ir", "head"])
def test_a_pattern_matches_whole_names_and_one_that_matches_none_is_refused(pattern):
    with pytest.raises(InputError, match=f"unknown layer pattern '{pattern}'.*whole names"):
        map_layers(build("backwards"), X, exclude=[pattern])


def test_leaves_include_batch_norm():
    assert names(map_layers(build("normed"), X, granularity="leaves"))[:4] == ["conv1", "bn1", "conv2", "bn2"]


def test_blocks_are_the_innermost_modules_with_two_convolutions():
    layers = map_layers(build("resnet18"), X, granularity="blocks")
    stages = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert names(layers) == ["conv1", *stages, "linear"]
    assert layers[-1].classifier
    assert "layer2.0.shortcut.0.weight" in layers[3].parameters


def test_resnet18_has_the_papers_twenty_convolutions_and_then_the_classifier():
    layers = map_layers(models.create("resnet18", width=4, seed=0), torch.rand(1, 3, 16, 16))
    assert [layer.index for layer in layers] == list(range(21))
    assert [layers[i].name for i in (0, 1, 6, 7, 11, 19, 20)] == [
        "conv1",
        "layer1.0.conv1",
        "layer2.0.conv2",
        "layer2.0.shortcut.0",
        "layer3.0.conv2",
        "layer4.1.conv2",
        "linear",
    ]
    assert [layer.classifier for layer in layers] == [False] * 20 + [True]
    assert layers[7].norm == "layer2.0.shortcut.1"
    assert all(layer.norm for layer in layers[:20])


def test_an_unknown_name_is_refused_with_the_nearest_one():
    layers = map_layers(build("backwards"), X)
    with pytest.raises(InputError, match=r"unknown layer 'fiirst'; did you mean 'first'.*toughen list layers MODEL"):
        layers.by_name("fiirst")


def test_a_model_without_layers_is_refused():
    with pytest.raises(InputError, match="Sequential ran no layer that owns weights"):
        map_layers(nn.Sequential(nn.Flatten(), nn.ReLU()), X)


@pytest.mark.parametrize("name", EVERY)
def test_mapping_leaves_the_model_as_found(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        map_layers(model, X)
