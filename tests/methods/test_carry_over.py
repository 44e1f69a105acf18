"""Carry-over against attacks that never stopped, through augmentation, resets, resuming, and with other methods."""

import io
from dataclasses import replace

import pytest
import torch

from as_found import same
from toughen.attacks import PGD
from toughen.data import DataSplits, ImageSet, train_loader
from toughen.data.augment import Crop, CropFlip, Cutout, Flip
from toughen.errors import InputError
from toughen.methods import CLAT, CarryOver, stack
from toughen.objectives import PGDAT, TRADES, CleanCE
from toughen.types import Batch, ThreatModel
from zoo import build, images

N, EPS = 12, 0.1
X, Y = images(N)
INDEX = torch.arange(N)
# a whole number of the steps in which l_inf perturbations are stored
ONE_STEP = PGD(ThreatModel(eps=EPS), step_size=40 * EPS / 127, steps=1, random_start=False)
L2_STEP = PGD(ThreatModel(norm="l2", eps=1.0), step_size=0.3, steps=1, random_start=False)


def bound(*methods, attack=ONE_STEP, model=None, **settings):
    """The methods, by default PGD-AT, with carry-over around them, on a model in float64."""
    model = build("attention").double().eval() if model is None else model
    return stack(*(methods or (PGDAT(),)), CarryOver(**settings)).bind(model, attack=attack)


def epoch(live, number, batches):
    """One epoch without an optimizer, and the perturbed images of its batches."""
    live.epoch_start(number, [(X.double(), Y)])
    draw = torch.Generator().manual_seed(number)
    return [live.perturb(batch, generator=draw) for batch in batches]


def unmoved(order=INDEX, size=4):
    return [Batch(X[rows].double(), Y[rows], rows) for rows in torch.split(order, size)]


def perturbations(advs):
    """x_adv - x by image."""
    out = torch.zeros(N, *X.shape[1:], dtype=torch.float64)
    for adv in advs:
        out[adv.batch.index] = adv.x_adv - adv.batch.x
    return out


@pytest.mark.parametrize(("attack", "tolerance"), [(ONE_STEP, 1e-8), (L2_STEP, 2e-3)], ids=["linf", "l2"])
def test_one_step_in_each_of_five_epochs_is_an_attack_of_five_steps(attack, tolerance):
    live = bound(attack=attack)
    orders = [torch.randperm(N, generator=torch.Generator().manual_seed(number)) for number in range(5)]
    ends = [perturbations(epoch(live, number, unmoved(order))) for number, order in enumerate(orders)]
    for steps, end in enumerate(ends, start=1):
        whole = replace(attack, steps=steps)(live.model, X.double(), Y)
        torch.testing.assert_close(end, whole - X.double(), rtol=0, atol=tolerance)
    assert (ends[4] - ends[0]).abs().max() > 10 * tolerance


def varied(*augment, number=0, count=N, seed=0):
    """The batches of an epoch, moved, in float64; every level is far from black and white."""
    levels = (X * 255).round().to(torch.uint8)
    data = ImageSet(levels[:count], Y[:count], tuple("abcd"))
    splits = DataSplits("test", data, data, data)
    loader = train_loader(splits, batch_size=4, device="cpu", seed=seed, augment=augment, track_pixels=True)
    return [batch._replace(x=batch.x.double()) for batch in loader.epoch(number)]


def test_an_attack_goes_on_in_the_stored_image_whichever_way_it_is_flipped():
    flipped, plain = bound(model=Mirrored()), bound(model=Mirrored())
    for number in range(4):
        found = epoch(flipped, number, varied(Flip(), number=number))
        expected = perturbations(epoch(plain, number, varied(number=number)))
        for adv in found:
            back = adv.batch.source.flatten(1)[:, None].expand(-1, 3, -1)
            stored = expected[adv.batch.index].flatten(2).gather(2, back).view(adv.x_adv.shape)
            torch.testing.assert_close(adv.x_adv - adv.batch.x, stored, rtol=0, atol=1e-12)
    sources = torch.cat([adv.batch.source for adv in found])
    assert 0 < int((sources[:, 0, 0] > 0).sum()) < N


class Mirrored(torch.nn.Module):
    """A network that does not see in which of both directions an image looks."""

    def __init__(self):
        super().__init__()
        self.net = build("attention").double().eval()

    def forward(self, x):
        return self.net(x) + self.net(x.flip(-1))


class Marks:
    """Takes note of its starts, and perturbs every pixel by a level of its own."""

    threat = ThreatModel(eps=EPS)
    random_start = True

    def __init__(self):
        self.starts = []

    def __call__(self, model, x, y, *, start=None, **asked):
        self.starts.append(start)
        places = torch.arange(64, dtype=x.dtype, device=x.device).view(1, 1, 8, 8)
        return x + EPS / 127 * (1 + places)


def test_each_pixel_starts_where_it_ended_and_one_that_was_not_there_before_starts_at_random():
    attack = Marks()
    live = bound(attack=attack, model=build("attention"))
    first, second = (varied(Crop(pad=3), Cutout(size=2), number=number) for number in (0, 1))
    ended = torch.full((N, 64), torch.nan, dtype=torch.float64)
    for adv in epoch(live, 0, first):
        for image, source in zip(adv.batch.index, adv.batch.source.flatten(1), strict=True):
            ended[image, source[source >= 0]] = EPS / 127 * (1 + torch.arange(64.0, dtype=torch.float64))[source >= 0]
    assert attack.starts == [None] * 3
    epoch(live, 1, second)

    fresh = []
    for batch, start in zip(second, attack.starts[3:], strict=True):
        known = torch.cat([ended, torch.full((N, 1), torch.nan)], dim=1)[batch.index[:, None], batch.source.flatten(1)]
        known = known.view(-1, 1, 8, 8).expand_as(start)
        delta = start - batch.x
        torch.testing.assert_close(delta[~known.isnan()], known[~known.isnan()])
        fresh.append(delta[known.isnan() & (batch.x > 0)])
        assert bool(((start >= 0) & (start <= 1)).all())
    assert {True, False} == set((torch.cat(fresh) > 0).tolist())
    assert 0.9 * EPS < torch.cat(fresh).abs().max() <= EPS * (1 + 1e-9)


def test_a_pixel_that_is_cut_away_keeps_its_perturbation():
    attack = Marks()
    live = bound(attack=attack, model=build("attention"))
    epoch(live, 0, unmoved())
    gone = [batch._replace(source=torch.full((4, 8, 8), -1)) for batch in unmoved()]
    epoch(live, 1, gone)
    epoch(live, 2, unmoved())
    expected = (EPS / 127 * (1 + torch.arange(64.0, dtype=torch.float64))).view(1, 1, 8, 8).expand_as(X)
    deltas = [start - batch.x for start, batch in zip(attack.starts[-3:], unmoved(), strict=True)]
    torch.testing.assert_close(torch.cat(deltas), expected)
    assert not torch.allclose(attack.starts[4] - gone[1].x, expected[:4])


@pytest.mark.parametrize("random_start", [True, False])
def test_an_image_that_was_not_seen_before_starts_afresh_and_never_at_a_point_without_gradient(random_start):
    attack = Marks()
    attack.random_start = random_start
    live = bound(attack=attack, model=build("attention"))
    epoch(live, 0, unmoved()[:2])
    for number in (1, 2):  # it lies beyond the images of the first epoch: nothing about it is kept
        epoch(live, number, unmoved()[2:])
        delta = attack.starts[-1] - X[8:].double()
        assert 0 < delta.abs().max() <= EPS
        assert bool(delta.abs().max() < 0.01) is not random_start


def test_extra_images_whose_pixels_are_not_tracked_start_afresh_and_leave_what_is_stored_alone():
    attack = Marks()
    live = bound(attack=attack, model=build("attention"))
    untracked = torch.cat([torch.arange(64).view(1, 8, 8).expand(2, -1, -1), torch.full((2, 8, 8), -1)])
    mixed = [Batch(X[:4].double(), Y[:4], torch.tensor([0, 1, 10**9, 10**9]), untracked)]
    for number in range(3):
        epoch(live, number, mixed)
        assert live.state_dict()["stored"] is None or len(live.state_dict()["stored"]) == 3
    own, extra = (attack.starts[-1] - mixed[0].x).split(2)
    torch.testing.assert_close(own[:, :, 0, 0], torch.full((2, 3), EPS / 127, dtype=torch.float64))
    assert bool((extra < 0).any())


def test_an_image_without_a_place_leaves_no_start_to_others():
    attack = Marks()
    live = bound(attack=attack, model=build("attention"))
    for number in range(2):
        epoch(live, number, [Batch(X[:4].double(), Y[:4], torch.tensor([0, 1, -1, -1]))])
    own, nowhere = (attack.starts[-1] - X[:4].double()).split(2)
    torch.testing.assert_close(own[:, :, 0, 0], torch.full((2, 3), EPS / 127, dtype=torch.float64))
    assert bool((nowhere < 0).any())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reset_every": 2}, [False, True, False, True, False]),
        ({"reset_every": None}, [False, True, True, True, True]),
        ({"start_epoch": 2}, [False, False, False, True, True]),
        ({"start_epoch": 1, "reset_every": 3}, [False, False, True, True, False]),
    ],
    ids=str,
)
def test_it_carries_over_between_resets(settings, expected):
    attack = Marks()
    live = bound(attack=attack, model=build("attention"), **settings)
    for number in range(5):
        epoch(live, number, unmoved())
    assert [start is not None for start in attack.starts[::3]] == expected


@pytest.mark.parametrize("threat", [ThreatModel(eps=0.4), ThreatModel(norm="l2", eps=3.0)], ids=["linf", "l2"])
def test_starts_and_ends_lie_in_ball_and_box(threat):
    attack = PGD(threat, step_size=threat.eps / 2, steps=2)
    live = bound(attack=attack)
    for number in range(4):
        for adv in epoch(live, number, varied(CropFlip(pad=2), number=number)):
            for point in [adv.x_adv, *([] if number == 0 else [adv.batch.start])]:
                delta = (point - adv.batch.x).flatten(1)
                length = delta.abs().amax(dim=1) if threat.norm == "linf" else delta.norm(dim=1)
                assert length.max() <= threat.eps * (1 + 1e-6)
                assert 0 <= point.min() <= point.max() <= 1
    assert length.max() > 0.9 * threat.eps


def test_before_anything_is_stored_it_is_the_inner_method_to_the_bit():
    pgd = PGD(ThreatModel(eps=EPS), step_size=0.05, steps=2)
    plain = stack(PGDAT()).bind(build("attention").double().eval(), attack=pgd)
    for one, two in zip(epoch(bound(attack=pgd), 0, unmoved()), epoch(plain, 0, unmoved()), strict=True):
        assert same(one.x_adv, two.x_adv)


def trained(live, optimizer, number, batches):
    if number is not None:
        live.epoch_start(number, [(X, Y)], optimizer=optimizer)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = live.on(batch._replace(x=batch.x.float())).loss
        loss.backward()
        optimizer.step()
        live.step_end()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(("after", "norm"), [((0, 1), "linf"), ((0, 3), "l2"), ((1, 1), "linf"), ((2, 2), "l2")])
def test_a_run_resumed_inside_any_epoch_goes_on_bit_for_bit(after, norm, start_epoch):
    attack = PGD(ThreatModel(norm=norm, eps=EPS), step_size=EPS / 4, steps=1)
    live, again = (bound(attack=attack, model=build("nested", seed=s), start_epoch=start_epoch) for s in (0, 1))
    number, steps = after
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    for before in range(number):
        trained(live, optimizer, before, varied(CropFlip(pad=2), number=before))
    rest = varied(CropFlip(pad=2), number=number)
    trained(live, optimizer, number, rest[:steps])
    file = io.BytesIO()
    torch.save([live.state_dict(), live.model.state_dict()], file)
    in_memory = live.state_dict()
    following = varied(CropFlip(pad=2), number=number + 1)
    expected = trained(live, optimizer, None, rest[steps:]) + trained(live, optimizer, number + 1, following)

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    losses = trained(again, optimizer, None, rest[steps:]) + trained(again, optimizer, number + 1, following)
    assert all(same(a, b) for a, b in zip(losses, expected, strict=True))
    assert same(in_memory["stored"], state["stored"])  # training on does not reach into a state that was taken
    assert len(in_memory["collected"]) == len(state["collected"])


@pytest.mark.parametrize("epochs", [0, 1], ids=["nothing stored", "something stored"])
def test_no_step_asks_the_device_for_a_number(epochs):
    here = bound(attack=Marks(), model=build("attention"))
    for number in range(epochs):
        epoch(here, number, unmoved())
    here.epoch_start(epochs)
    there = bound(attack=Marks(), model=build("attention").to("meta"))  # where there are no numbers to be told
    there.load_state_dict(here.state_dict())
    batch = varied(CropFlip(pad=2))[0]
    batch = Batch(*(value.to("meta") for value in batch[:4]))
    assert there.perturb(batch, generator=torch.Generator()).x_adv.shape == batch.x.shape
    with pytest.raises(RuntimeError, match="meta"):
        bool(batch.x.max() > 0)


@pytest.mark.parametrize(("attack", "size"), [(ONE_STEP, 1), (L2_STEP, 2)], ids=["linf", "l2"])
def test_it_stores_one_byte_per_value_or_two_for_l2(attack, size):
    live = bound(attack=attack)
    epoch(live, 0, unmoved())
    live.epoch_start(1)
    assert live.state_dict()["stored"].nbytes == size * (N + 1) * 3 * 8 * 8


STACKS = [
    (TRADES(), CarryOver()),
    (PGDAT(), CarryOver(), CLAT(k=1, base="inner")),
    (PGDAT(), CarryOver(), CLAT(k=1, base="inner", lam=0)),
    (PGDAT(), CLAT(k=1), CarryOver()),
    (PGDAT(), CLAT(k=1, base="inner", lam=0), CarryOver()),
]


@pytest.mark.parametrize("methods", STACKS, ids=lambda methods: stack(*methods).label)
def test_two_epochs_train_alone_and_around_and_inside_of_clat(methods):
    model = build("nested")
    attack = PGD(ThreatModel(eps=EPS), step_size=EPS / 2, steps=1)
    live = stack(*methods).bind(model, attack=attack)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [loss for number in (0, 1) for loss in trained(live, optimizer, number, unmoved())]
    assert all(loss.isfinite() for loss in losses)
    changed = {name.rpartition(".")[0] for name, p in model.named_parameters() if not same(p, before[name])}
    assert changed if live.selected is None else changed == set(live.selected)


@pytest.mark.parametrize(
    "clat", [CLAT(k=1), CLAT(k=1, base="inner"), CLAT(k=1, base="inner", lam=0.0)], ids=["own", "both", "inner"]
)
def test_around_clat_its_attack_on_the_features_begins_where_it_ended(clat):
    live = bound(PGDAT(), clat, model=build("nested").double(), attack=replace(ONE_STEP, random_start=True))
    first, second = (epoch(live, number, unmoved()) for number in (0, 1))
    for before, after in zip(first, second, strict=True):
        adv = before if before.x_adv is not before.batch.x else before.inner
        torch.testing.assert_close(after.batch.start, adv.x_adv, rtol=0, atol=EPS / 253)
        assert not same(adv.x_adv, adv.batch.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_of_any_layout_and_precision_are_stored_alike(dtype):
    live = bound(model=build("nested").to(dtype))
    batch = Batch(X.to(dtype).contiguous(memory_format=torch.channels_last), Y, INDEX, torch.arange(64).view(1, 8, 8))
    batch = batch._replace(source=batch.source.expand(N, -1, -1))
    (first,), (second,) = (epoch(live, number, [batch]) for number in (0, 1))
    assert second.batch.start.dtype == dtype
    torch.testing.assert_close(second.batch.start, first.x_adv, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.01)


def test_its_label_stands_in_the_row_label():
    assert stack(PGDAT(), CLAT(k=1), CarryOver()).label == "PGD-AT + CLAT + ATTA"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset_every": 1}, "carry-over reset_every is 1; it must be at least 2, .* or null for no reset"),
        ({"start_epoch": -1}, "carry-over start_epoch is -1; it must be >= 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CarryOver(**settings)


def test_what_it_can_not_work_with_is_refused_in_one_line():
    with pytest.raises(InputError, match="ATTA stands alone but it only changes the training of another method"):
        stack(CarryOver())
    with pytest.raises(InputError, match=r"use stack\(PGDAT\(\), CarryOver"):
        CarryOver().bind(build("nested"), attack=ONE_STEP)
    with pytest.raises(InputError, match="set eps > 0"):
        bound(attack=PGD(ThreatModel(eps=0.0), step_size=0.0))
    with pytest.raises(InputError, match="ATTA does not go with clean: it attacks nothing"):
        stack(CleanCE(), CarryOver())
    with pytest.raises(InputError, match="ATTA inside CLAT would never act"):
        stack(PGDAT(), CarryOver(), CLAT(k=1))
    with pytest.raises(InputError, match=r"this batch has no index; call live\(x, y, index\)"):
        bound()(X.double(), Y)


@pytest.mark.parametrize("attack", [ONE_STEP, L2_STEP], ids=["linf", "l2"])
def test_a_spoiled_step_does_not_come_back_in_the_next_epoch(attack):
    live = bound(attack=attack)
    epoch(live, 0, unmoved())
    weight = next(live.model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    epoch(live, 1, unmoved())
    with torch.no_grad():
        weight.copy_(kept)
    assert perturbations(epoch(live, 2, unmoved())).isfinite().all()
