"""Networks drawn at random: what the layer map, truncation, analysis and CLAT promise holds for any of them."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from as_found import disturb, left_as_found, same
from toughen.attacks import PGD
from toughen.criticality import analyze
from toughen.errors import InputError
from toughen.layers import ModelView, map_layers
from toughen.methods import CLAT
from toughen.types import ThreatModel

NUM_CLASSES = 3
PGD1 = PGD(ThreatModel(eps=0.1), step_size=0.1, steps=1)
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

Step = Callable[[Tensor], Tensor]


class Tuple(nn.Conv2d):
    """A convolution that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out.mean()


class Drawn(nn.Module):
    """A network of random steps; its modules are registered in random order, under names of any depth."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.training_noise = False
        channels, side = self.draw.choice([1, 3]), self.draw.choice([1, 5, 8, 8, 9])
        self.image = (channels, side, side)
        self._modules_made: list[nn.Module] = []
        self.kernels = nn.ParameterList()
        self.kinds: list[str] = []
        steps: list[Step] = []
        x = torch.rand(2, *self.image)
        for _ in range(self.draw.randint(1, 6)):
            step = self._step(x, depth=0)
            steps.append(step)
            x = step(x).detach()
        steps.append(self._head(x))
        if self.draw.random() < 0.2:
            self._keep(nn.Conv2d(2, 2, 1))  # never called
            self.kinds.append("never called")
        self._register()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    # -- what a network is made of --------------------------------------------------------------------

    def _step(self, x: Tensor, *, depth: int) -> Step:
        kinds = ["conv", "conv", "grouped", "norm", "act", "act", "pool", "functional", "dropout", "tokens", "layout"]
        if depth < 2:
            kinds += ["residual", "residual", "dense", "branches", "shared", "tuple", "gate", "transposed", "attention"]
        kind = self.draw.choice(kinds)
        self.kinds.append(kind)
        step: Step = getattr(self, f"_{kind}")(x, depth)
        return step

    def _keep(self, module: nn.Module) -> nn.Module:
        self._modules_made.append(module)
        return module.eval()

    def _register(self) -> None:
        self.draw.shuffle(self._modules_made)
        for number, module in enumerate(self._modules_made):
            place: nn.Module = self
            for level in range(self.draw.choice([0, 0, 1, 2])):
                if not hasattr(place, f"part{level}"):
                    place.add_module(f"part{level}", nn.Module())
                place = place.get_submodule(f"part{level}")
            place.add_module(f"m{number}", module)

    def _conv(self, x: Tensor, depth: int) -> Step:
        size, stride = self.draw.choice([1, 3]), self.draw.choice([1, 1, 2])
        out, bias = self.draw.choice([2, 4, 6]), self.draw.random() < 0.5
        return self._keep(nn.Conv2d(x.shape[1], out, size, stride=stride, padding=size // 2, bias=bias))

    def _grouped(self, x: Tensor, depth: int) -> Step:
        return self._keep(nn.Conv2d(x.shape[1], 2 * x.shape[1], 3, padding=1, groups=x.shape[1]))

    def _transposed(self, x: Tensor, depth: int) -> Step:
        return self._keep(nn.ConvTranspose2d(x.shape[1], 4, 2, stride=self.draw.choice([1, 2])))

    def _norm(self, x: Tensor, depth: int) -> Step:
        norms = [nn.BatchNorm2d(x.shape[1]), nn.GroupNorm(1, x.shape[1])]
        return self._keep(self.draw.choice(norms if x[0].numel() > 1 else norms[:1]))

    def _act(self, x: Tensor, depth: int) -> Step:
        acts: list[Step] = [
            nn.ReLU(),
            nn.ReLU(inplace=True),
            nn.GELU(),
            nn.SiLU(inplace=True),
            nn.Tanh(),
            nn.Softplus(),
        ]
        act = self.draw.choice([*acts, torch.sin, torch.Tensor.relu_, lambda x: x.mul_(0.5), F.leaky_relu])
        inplace = act not in acts or getattr(act, "inplace", False)
        if isinstance(act, nn.Module):
            self._keep(act)
        # the image itself, and what a branch needs once more, is not for a step to overwrite
        return (lambda x: act(x.clone())) if inplace and (depth or not self.steps_so_far()) else act

    def steps_so_far(self) -> bool:
        return any(kind in ("conv", "grouped", "transposed") for kind in self.kinds[:-1])

    def _pool(self, x: Tensor, depth: int) -> Step:
        if min(x.shape[2:]) < 2:
            return nn.Identity()
        module = self._keep(self.draw.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]))
        return self.draw.choice([module, lambda x: F.max_pool2d(x, 2), lambda x: F.interpolate(x, scale_factor=0.5)])

    def _functional(self, x: Tensor, depth: int) -> Step:
        kernel = nn.Parameter(0.3 * torch.randn(4, x.shape[1], 1, 1))
        self.kernels.append(kernel)
        return lambda x: F.conv2d(x, kernel).clamp(min=-1)

    def _dropout(self, x: Tensor, depth: int) -> Step:
        return self.draw.choice([self._keep(nn.Dropout(0.3)), self._keep(nn.Dropout2d(0.3))])

    def _layout(self, x: Tensor, depth: int) -> Step:
        return lambda x: x.contiguous(memory_format=torch.channels_last)

    def _tokens(self, x: Tensor, depth: int) -> Step:
        norm, linear = self._keep(nn.LayerNorm(x.shape[1])), self._keep(nn.Linear(x.shape[1], 4))
        return lambda x: linear(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def _attention(self, x: Tensor, depth: int) -> Step:
        channels = x.shape[1]
        attention = self._keep(nn.MultiheadAttention(channels, 1, batch_first=True))

        def attend(x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            mixed = tokens + attention(tokens, tokens, tokens, need_weights=False)[0]
            return mixed.transpose(1, 2).reshape(x.shape)

        return attend

    def _residual(self, x: Tensor, depth: int) -> Step:
        inner = self._chain(x, depth)
        out = inner(x)
        end = self._keep(nn.Conv2d(out.shape[1], x.shape[1], 1))
        if self.draw.random() < 0.3:
            return lambda x: end(_resized(inner(x), x)).add_(x)
        return lambda x: x + end(_resized(inner(x), x))

    def _dense(self, x: Tensor, depth: int) -> Step:
        inner = self._chain(x, depth)
        return lambda x: torch.cat([x, _resized(inner(x), x)], dim=1)

    def _branches(self, x: Tensor, depth: int) -> Step:
        branches = [self._keep(nn.Conv2d(x.shape[1], 4, 1)) for _ in range(self.draw.choice([2, 3]))]
        if self.draw.random() < 0.5:
            return lambda x: torch.cat([branch(x) for branch in branches], dim=1)
        return lambda x: sum((branch(x) for branch in reversed(branches[1:])), branches[0](x))

    def _shared(self, x: Tensor, depth: int) -> Step:
        conv = self._keep(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1))
        return lambda x: conv(torch.tanh(conv(x)))

    def _tuple(self, x: Tensor, depth: int) -> Step:
        conv = self._keep(Tuple(x.shape[1], 4, 1))

        def both(x: Tensor) -> Tensor:
            out, mean = conv(x)
            return out + mean.tanh()

        return both

    def _gate(self, x: Tensor, depth: int) -> Step:
        conv = self._keep(nn.Conv2d(x.shape[1], x.shape[1], 1))
        return lambda x: x * conv(x.mean(dim=(2, 3), keepdim=True)).sigmoid()

    def _chain(self, x: Tensor, depth: int) -> Step:
        first = self._step(x, depth=depth + 1)
        second = self._step(first(x).detach(), depth=depth + 1)
        return lambda x: second(first(x))

    def _head(self, x: Tensor) -> Step:
        if self.draw.random() < 0.5:
            flat: Step = lambda x: x.mean(dim=(2, 3))  # noqa: E731
        else:
            flat = lambda x: x.flatten(1)  # noqa: E731
        width = flat(x).shape[1]
        if self.draw.random() < 0.3:
            hidden, last = self._keep(nn.Linear(width, 5)), self._keep(nn.Linear(5, NUM_CLASSES))
            return lambda x: last(hidden(flat(x)).relu())
        last = self._keep(nn.Linear(width, NUM_CLASSES))
        return lambda x: last(flat(x))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, size=like.shape[2:])


# -- what is promised of each -------------------------------------------------------------------------


def drawn(seed: int) -> tuple[Drawn, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Drawn(seed)
        x = 0.2 + 0.6 * torch.rand(4, *model.image)
        model.train()
        with torch.no_grad():
            model(x)  # batch norm has seen some data
    return model, x, torch.arange(4) % NUM_CLASSES


def seen_by_hooks(model: nn.Module, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """How often each weight layer runs, in order of first execution, and the elements of its output for one sample."""
    calls: dict[str, int] = {}
    sizes: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):

            def see(module: nn.Module, _: object, out: Tensor, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                if isinstance(out, Tensor):
                    sizes[name] = out.numel() // len(x)

            hooks.append(module.register_forward_hook(see))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls, sizes


def check_map(model: nn.Module, x: Tensor) -> None:
    model.eval()
    calls, sizes = seen_by_hooks(model, x)
    layers = map_layers(model, x[:1])
    assert [layer.name for layer in layers] == [name for name in calls if name in sizes]
    assert {layer.name: layer.num_features for layer in layers} == sizes
    assert {layer.name: layer.num_calls for layer in layers} == {name: calls[name] for name in sizes}
    assert set(layers.tuples) == calls.keys() - sizes.keys()
    weights = {n for n, m in model.named_modules() if isinstance(m, WEIGHTED)}
    never = {name for name in weights - calls.keys() if not name.endswith("out_proj")}  # attention calls no module
    assert never <= set(layers.unseen)


def check_truncation(model: nn.Module, x: Tensor) -> None:
    model.eval()
    for layer in map_layers(model, x[:1]).measurable:
        found = []
        for stop_early in (False, True):
            start = x.clone().requires_grad_(True)
            feature = ModelView(model).features(start, [layer.name], stop_early=stop_early).values[layer.name]
            gradient = torch.autograd.grad(feature.square().sum(), start)[0]
            found.append((feature, gradient))
        assert all(torch.equal(full, truncated) for full, truncated in zip(*found, strict=True)), layer.name


def check_analysis(model: nn.Module, x: Tensor, y: Tensor) -> None:
    disturb(model)
    with left_as_found(model):
        report = analyze(model, [(x, y)], PGD1)
    assert [row.name for row in report.rows] == [layer.name for layer in map_layers(model, x[:1])]


def check_clat(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> bool:
    """One step of CLAT; False where the network has no layer that it could select."""
    model.train()
    rule = random.Random(seed).choice(["top", "bottom", "random"])
    live = CLAT(k=1, lam=0.5, select=rule).bind(model, attack=PGD1)
    try:
        live.epoch_start(0, [(x, y)])
    except InputError:  # nothing to choose from, or the first layer is constant: nothing is measured behind it
        rows = analyze(model, [(x, y)], PGD1).ranked()
        assert not any(row.criticality for row in rows)
        return False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    live(x, y).loss.backward()
    (selected,) = live.selected
    moves = any(p.grad is not None and p.grad.abs().max() > 1e-5 for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not same(value, before[name])}
    assert all(name.startswith(f"{selected}.") for name in changed), (selected, changed)
    assert changed or not moves
    return True


def check(seed: int) -> Counter[str]:
    model, x, y = drawn(seed)
    check_map(model, x)
    check_truncation(model, x)
    trained = check_clat(model, x, y, seed)
    check_analysis(model, x, y)
    return Counter({"tried": 1, "trained": trained, **Counter(set(model.kinds))})


@pytest.mark.parametrize("seed", range(12))
def test_a_random_network_keeps_what_is_promised_of_all(seed: int) -> None:
    check(seed)


@pytest.mark.slow
def test_five_hundred_random_networks_keep_what_is_promised_of_all() -> None:
    counts: Counter[str] = Counter()
    for seed in range(1000, 1500):
        counts += check(seed)

    told = ", ".join(f"{kind} {count}" for kind, count in counts.items() if kind not in ("tried", "trained"))
    print(
        f"\nrandom networks: tried {counts['tried']}, survived {counts['tried']}, trained a step {counts['trained']},"
        f" lost 0, tracebacks 0 ({told})"
    )
    assert counts["trained"] > 400
