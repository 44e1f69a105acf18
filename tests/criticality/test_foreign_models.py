"""Analysis and CLAT of networks from timm and torchvision: none is known by name, all are measured."""

import math

import pytest
import torch
import torch.nn.functional as F

import toughen as tg
from as_found import disturb, left_as_found
from toughen.criticality import CriticalityOptions, analyze
from toughen.layers import ModelView, map_layers
from zoo import FOREIGN, FOREIGN_IMAGE, build, images

X, Y = images(4, size=FOREIGN_IMAGE)
THREAT = tg.ThreatModel(norm="linf", eps=8 / 255)
PGD1 = tg.PGD(THREAT, step_size=8 / 255, steps=1, random_start=False)
PGD_SHIFTED = tg.PGD(THREAT, step_size=4 / 255, steps=2)
# What the forward of these models computes without calling a module, or not from the image.
UNMEASURED = {"swinv2": ("meta_mlp",), "torchvision_vit": ("self_attention",)}


def weaknesses(report):
    return {row.name: row.weakness for row in report.rows}


@pytest.mark.parametrize("options", [{}, {"predecessor": "graph"}, {"granularity": "blocks"}], ids=str)
@pytest.mark.parametrize("name", FOREIGN)
def test_every_layer_of_a_foreign_model_is_measured_and_the_model_left_as_found(name, options):
    model = build(name)
    disturb(model)
    with left_as_found(model):
        report = analyze(model, [(X, Y)], PGD1, options=CriticalityOptions(**options))
    assert all(row.weakness > 0 and math.isfinite(row.criticality) for row in report.rows)
    assert len(report.ranked()) == len(report.rows) - (2 if name == "distilled" else 1)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    if options.get("granularity") != "blocks":
        expected = [n for n in layers if not any(f".{part}." in n for part in UNMEASURED.get(name, ()))]
        assert sorted(row.name for row in report.rows) == sorted(expected)
        assert {note.split(": ")[0] for note in report.notes} >= set(layers) - set(expected)


@pytest.mark.parametrize("name", ["swin", "windowed"])
def test_the_weakness_of_windows_is_that_of_the_reshaped_tensor(name):
    model = build(name).eval()
    x, y = (X, Y) if name == "swin" else images(4)
    layer = "layers.0.blocks.0.attn.qkv" if name == "swin" else "mix"
    report = analyze(model, [(x, y)], PGD1)
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        model(x), model(PGD1(model, x, y))
    hook.remove()
    clean, moved = (out.double().reshape(4, -1) for out in (seen[0], seen[-1]))
    assert len(seen[0]) == 4 * 4  # four windows of each image
    row = next(row for row in report.rows if row.name == layer)
    assert row.num_features == clean.shape[1]
    assert row.num_samples == 4
    assert row.weakness == pytest.approx(float((moved - clean).norm(dim=1).mean()) / clean.shape[1], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"predecessor": "graph"}, {"measure": "curvature"}], ids=str)
def test_the_order_and_the_size_of_batches_change_no_windowed_layer(options):
    model, order = build("swin"), torch.tensor([2, 0, 3, 1])
    asked = CriticalityOptions(**options, exclude=("layers.1.*",))
    whole = analyze(model, [(X, Y)], PGD1, options=asked)
    permuted = analyze(model, [(X[order], Y[order])], PGD1, options=asked)
    parts = analyze(model, [(X[:1], Y[:1]), (X[1:], Y[1:])], PGD1, options=asked)
    assert weaknesses(permuted) == pytest.approx(weaknesses(whole), rel=1e-4)
    assert weaknesses(parts) == pytest.approx(weaknesses(whole), rel=1e-4)
    indices = [[row.criticality for row in report.rows] for report in (whole, parts)]
    assert indices[1] == pytest.approx(indices[0], rel=1e-4)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_truncated_equals_full_bit_for_bit_in_transformers(name):
    model = build(name).eval()
    layers = [layer.name for layer in map_layers(model, X[:1]).selectable[::3]]
    found = []
    for stop_early in (False, True):
        x = X.clone().requires_grad_(True)
        values = ModelView(model).features(x, layers, stop_early=stop_early).values
        assert all(len(value) == len(x) for value in values.values())
        gradient = torch.autograd.grad(sum(values[layer].square().sum() for layer in layers), x)[0]
        found.append([*(values[layer] for layer in layers), gradient])
    assert all(torch.equal(full, truncated) for full, truncated in zip(*found, strict=True))


@pytest.mark.parametrize("granularity", ["weights", "blocks"])
@pytest.mark.parametrize(("name", "layer"), [("swin", "layers.0.blocks.0"), ("vit", "blocks.1")])
def test_clat_trains_one_block_of_a_transformer_and_freezes_the_rest_bit_for_bit(name, layer, granularity):
    model = build(name)
    chosen = layer if granularity == "blocks" else f"{layer}.attn.qkv"
    options = CriticalityOptions(granularity=granularity)
    clat = tg.CLAT(select="fixed", layers=(chosen,), criticality=options).bind(model, attack=PGD_SHIFTED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()  # momentum everywhere, which must not coast on
    assert clat.epoch_start(0, [(X, Y)], optimizer=optimizer).layers == (chosen,)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.zero_grad()
    out = clat(X, Y)
    assert out.terms["feature"] > 0
    out.loss.backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith(f"{chosen}.")}


def test_clat_selects_layers_of_a_swin_by_itself():
    clat = tg.CLAT(k=2).bind(build("swin"), attack=PGD_SHIFTED)
    assert len(clat.epoch_start(0, [(X, Y)]).layers) == 2
    assert torch.isfinite(clat(X, Y).loss)


def test_a_block_whose_input_has_no_samples_first_has_no_graph_predecessor():
    x, y = images(4)
    options = CriticalityOptions(predecessor="graph", granularity="blocks")
    patches, pool, classifier = analyze(build("pools_tokens"), [(x, y)], PGD1, options=options).rows
    assert pool.weakness > 0
    assert (pool.criticality, pool.shape_ratio) == (None, None)
    assert patches.criticality > 0
    assert classifier.criticality > 0


def test_a_norm_behind_two_layers_is_nobodys_tap():
    model, (x, y) = build("shared_norm"), images(4)
    behind = analyze(model, [(x, y)], PGD1, options=CriticalityOptions(tapped="norm"))
    assert behind.rows == analyze(model, [(x, y)], PGD1).rows
    assert "bn: runs more than once per forward, so belongs to no layer" in behind.notes
