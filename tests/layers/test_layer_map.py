"""The layer map: which layers, in which order, and what is said about the odd ones."""

import pytest
import torch
from torch import nn

from as_found import disturb, left_as_found
from toughen import models
from toughen.errors import InputError
from toughen.layers import LayerMap, map_layers
from zoo import EVERY, FOREIGN_IMAGE, build, images

X = images(1)[0]
FOREIGN_X = images(1, size=FOREIGN_IMAGE)[0]


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


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("convnext", ["head.fc"]),
        ("vit", ["head"]),
        ("distilled", ["head", "head_dist"]),
        ("swin", ["head.fc"]),
        ("efficientnet", ["classifier"]),
        ("regnet", ["head.fc"]),
        ("torchvision_densenet", ["classifier"]),
        ("torchvision_vit", ["heads.head"]),
        ("torchvision_efficientnet", ["classifier.1"]),
    ],
)
@pytest.mark.parametrize("granularity", ["weights", "leaves", "blocks"])
def test_the_classifier_of_a_foreign_model_is_its_last_layer(name, classifiers, granularity):
    layers = map_layers(build(name), FOREIGN_X, granularity=granularity)
    assert [layer.name for layer in layers if layer.classifier] == classifiers
    assert [layer.name for layer in layers[-len(classifiers) :]] == classifiers
    assert not set(classifiers) & {layer.name for layer in layers.selectable}


def test_what_follows_the_classifier_without_weights_does_not_hide_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4), nn.Dropout(0.5), nn.Identity())
    assert [layer.classifier for layer in map_layers(model, X)] == [False, True]


def test_a_layer_before_a_square_classifier_is_no_classifier():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert [layer.classifier for layer in map_layers(model, X)] == [False, False, True]


def test_an_excluded_classifier_makes_no_other_layer_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    assert [layer.classifier for layer in map_layers(model, X, exclude=["3"])] == [False]


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


@pytest.mark.parametrize("example", [X, torch.zeros_like(X), torch.ones_like(X)], ids=["random", "black", "white"])
def test_windows_that_follow_each_other_sample_by_sample_are_one_feature(example):
    layers = map_layers(build("windowed"), example)
    assert names(layers) == ["patches", "mix", "fc"]
    assert (layers[1].num_features, layers[1].num_inputs) == (4 * 4 * 6, 4 * 4 * 6)
    assert layers.notes() == []


@pytest.mark.parametrize("example", [X, torch.zeros_like(X)], ids=["random", "black"])
@pytest.mark.parametrize("name", ["windows_first", "queries_first"])
def test_rows_in_any_other_order_are_no_feature(name, example):
    layers = map_layers(build(name), example)
    assert layers.tuples == ("mix",)
    assert names(layers) == ["patches", "fc"]


def test_windows_that_do_not_depend_on_the_image_are_no_feature():
    model = build("windowed")
    with torch.no_grad():
        model.mix.weight.zero_()
    assert map_layers(model, X).tuples == ("mix",)


def test_an_input_without_the_samples_first_has_no_elements():
    layers = map_layers(build("pools_tokens"), X, granularity="blocks")
    assert [(layer.name, layer.num_inputs) for layer in layers] == [("patches", 192), ("pool", 0), ("fc", 8)]


def test_attention_is_reported_as_unmeasured_with_its_uncalled_projection():
    layers = map_layers(build("attention"), X)
    assert names(layers) == ["patches", "fc"]
    assert layers.others == ("attention.in_proj_weight",)
    assert layers.unseen == ("attention.out_proj",)
    assert layers.notes() == [
        "attention.out_proj: owns weights but was never called in the forward",
        "attention.in_proj_weight: is a weight that belongs to no layer, so is not measured",
    ]


def test_position_embeddings_are_told_and_what_is_added_to_all_positions_alike_is_not():
    model = build("vit")
    assert model.cls_token.shape == (1, 1, 16)
    assert map_layers(model, FOREIGN_X).notes() == [
        "pos_embed: is a weight that belongs to no layer, so is not measured"
    ]


def test_a_parametrized_layer_owns_what_its_weight_is_computed_from():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(144, 4))
    with left_as_found(model):
        layers = map_layers(model, X)
    assert layers[0].parameters == ("0.bias", "0.parametrizations.weight.original")
    assert layers.notes() == []


def test_a_norm_behind_two_layers_belongs_to_neither():
    layers = map_layers(build("shared_norm"), X)
    assert [layer.norm for layer in layers] == [None, None, None]
    assert layers.notes() == ["bn: runs more than once per forward, so belongs to no layer"]


def test_a_norm_behind_an_activation_that_works_in_place_follows_no_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    assert [layer.norm for layer in map_layers(model, X)] == [None, None]


def test_gates_are_told_in_one_line_that_names_two():
    layers = map_layers(build("efficientnet"), FOREIGN_X)
    assert len(layers.gates) == 6
    assert layers.notes() == [
        "blocks.0.0.se.conv_reduce, blocks.0.0.se.conv_expand and 4 more: "
        "one position each where later layers have more, as in squeeze-excitation; 1/N favours them, see exclude"
    ]
    assert map_layers(build("efficientnet"), FOREIGN_X, exclude=["*.se.*"]).notes() == []


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


def block_names(model, example) -> list[str]:
    return names(map_layers(model, example, granularity="blocks"))


def test_blocks_are_the_largest_modules_that_are_no_stage():
    layers = map_layers(build("resnet18"), X, granularity="blocks")
    stages = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert names(layers) == ["conv1", *stages, "linear"]
    assert layers[-1].classifier
    assert "layer2.0.shortcut.0.weight" in layers[3].parameters


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        (
            "convnext",
            "stem.0 stages.0.blocks.0 stages.1.downsample.1 stages.1.blocks.0 stages.1.blocks.1 "
            "stages.2.downsample.1 stages.2.blocks.0 stages.3.downsample.1 stages.3.blocks.0 head.fc",
        ),
        ("vit", "patch_embed.proj blocks.0 blocks.1 head"),
        ("distilled", "patch_embed.proj blocks.0 head head_dist"),
        ("mixer", "stem.proj blocks.0 blocks.1 head"),
        (
            "swin",
            "patch_embed.proj layers.0.blocks.0 layers.0.blocks.1 layers.1.downsample.reduction layers.1.blocks.0 "
            "head.fc",
        ),
        (
            "swinv2",
            "patch_embed.proj stages.0.blocks.0 stages.0.blocks.1 stages.1.downsample.reduction stages.1.blocks.0 "
            "head.fc",
        ),
        ("efficientnet", "conv_stem blocks.0.0 blocks.1.0 blocks.1.1 conv_head classifier"),
        ("regnet", "stem.conv s1.b1 s2.b1 s3.b1 s3.b2 s4.b1 s4.b2 head.fc"),
        (
            "torchvision_densenet",
            "features.conv0 features.denseblock1.denselayer1 features.denseblock1.denselayer2 "
            "features.transition1.conv features.denseblock2.denselayer1 features.denseblock2.denselayer2 classifier",
        ),
        ("torchvision_vit", "conv_proj encoder.layers.encoder_layer_0 encoder.layers.encoder_layer_1 heads.head"),
        ("torchvision_efficientnet", "features.0.0 features.1.0 features.2.0 features.2.1 features.3.0 classifier.1"),
    ],
)
def test_blocks_of_foreign_models_are_their_transformer_and_residual_blocks(name, blocks):
    assert block_names(build(name), FOREIGN_X) == blocks.split()


def test_blocks_of_a_wrapped_model_are_those_of_the_model():
    wrapped = nn.Sequential(nn.Identity(), build("swin"))
    assert block_names(wrapped, FOREIGN_X) == [f"1.{name}" for name in block_names(build("swin"), FOREIGN_X)]


@pytest.mark.parametrize("name", ["small_cnn", "vgg19"])
def test_a_model_without_blocks_has_its_single_layers(name):
    model = nn.Sequential(models.create(name, width=4, seed=0))
    assert block_names(model, FOREIGN_X) == names(map_layers(model, FOREIGN_X))


def test_pre_activation_blocks_and_dense_layers_are_blocks():
    preact = models.create("preact_resnet18", width=4, seed=0)
    stages = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert block_names(preact, FOREIGN_X) == ["conv1", *stages, "linear"]
    dense = block_names(models.create("densenet121", width=8, seed=0), FOREIGN_X)
    assert dense[:8] == ["conv1", *(f"dense1.{layer}" for layer in range(6)), "trans1.conv"]
    assert len(dense) == 1 + 58 + 3 + 1


def test_a_module_that_is_never_called_is_no_block():
    class Namespace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(192, 8), nn.Linear(8, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = Namespace(), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.body.b(self.body.a(x.flatten(1)).relu()))

    assert block_names(Net(), X) == ["body.a", "body.b", "fc"]


def test_attention_and_mlp_in_one_list_are_blocks_of_their_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(192, 8), nn.Linear(8, 192)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Gated(Residual):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleList([Residual(), Gated()]) for _ in range(2)])

        def forward(self, x):
            for first, second in self.layers:
                x = second(first(x))
            return x

    model = nn.Sequential(nn.Flatten(), Net(), nn.Linear(192, 4))
    assert block_names(model, X) == ["1.layers.0.0", "1.layers.0.1", "1.layers.1.0", "1.layers.1.1", "2"]


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


def test_a_model_can_be_mapped_in_inference_mode():
    model = build("normed")
    with torch.inference_mode():
        assert names(map_layers(model, X)) == ["conv1", "conv2", "conv3", "head.fc"]


@pytest.mark.parametrize("name", [*EVERY, "swin"])
def test_mapping_leaves_the_model_as_found(name):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        map_layers(model, FOREIGN_X if name == "swin" else X)
