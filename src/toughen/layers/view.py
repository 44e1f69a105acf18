"""How attacks and objectives look at a model: its logits, and its features with a forward that may stop early."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from toughen.errors import InputError
from toughen.layers.compiled import compiled_features
from toughen.layers.folding import FOLDED
from toughen.layers.taps import submodule, tap
from toughen.types import Features

Reduce = Callable[[str, Tensor], Tensor]


class _AllSeen(BaseException):
    """Private: every requested feature has been seen, so the rest of the forward is not needed.

    A ``BaseException``, so that no ``except Exception`` inside a model's forward can swallow it.
    """


class ModelView:
    """A model seen by attacks and objectives. Holds no state of its own and changes nothing in the model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits [B, K] of ``x`` [B, C, H, W]."""
        logits: Tensor = self.module(x)
        return logits

    def features(
        self, x: Tensor, names: Sequence[str], *, reduce: Reduce | None = None, stop_early: bool = False
    ) -> Features:
        """Return the output of the named layers, and the logits unless the forward stopped before them.

        With ``stop_early`` the forward ends as soon as the last requested layer has spoken; gradients are
        bit-identical to those of the full forward, since what follows does not enter them.

        Args:
            x: [B, C, H, W], in [0, 1].
            names: Qualified names of layers that one forward calls once.
            reduce: Called as ``reduce(name, feature)`` inside the forward, before anything downstream can change
                the output in place; None keeps a copy of the feature. Features are [B, ...], see ``samples_first``.
            stop_early: Whether to leave out what follows the last requested layer.

        Raises:
            InputError: A name is not a submodule, or one whose output does not hold the samples first, or is folded
                with its batch norm now.
            RuntimeError: A requested layer was not called.
        """
        wanted = set(names)
        if folded := [name for name in names if submodule(self.module, name) in FOLDED]:
            raise InputError(
                f"layer {folded[0]!r} is folded with its batch norm during this attack; a goal that looks at layers"
                " names them in its attribute 'layers'"
            )
        values: dict[str, Tensor] = {}
        compiled = compiled_features(self.module, wanted) if stop_early and not self.module.training else None
        if compiled is not None:
            found = {name: samples_first(name, output, len(x)) for name, output in compiled(x).items()}
            return Features({n: f if reduce is None else reduce(n, f) for n, f in found.items()}, None)

        def see(name: str, output: object) -> None:
            feature = samples_first(name, output, len(x))
            values[name] = feature.clone() if reduce is None else reduce(name, feature)
            if stop_early and values.keys() == wanted:
                raise _AllSeen

        logits: Tensor | None = None
        with tap(self.module, wanted, see), suppress(_AllSeen):
            logits = self.module(x)
        if missing := wanted - values.keys():
            raise RuntimeError(f"layers never called in this forward: {', '.join(sorted(missing))}")
        return Features(values, logits)


def samples_first(name: str, value: object, num_samples: int) -> Tensor:
    """Return [B * w, ...] as [B, w, ...], and [B, ...] as it is; nothing is copied.

    That the w rows of a sample follow each other can't be told from one tensor: ``map_layers`` has seen it for the
    layers that it lists.

    Raises:
        InputError: ``value`` is no tensor, or its first dimension is no multiple of the samples.
    """
    if not isinstance(value, Tensor) or not value.dim() or len(value) % num_samples:
        raise InputError(
            f"layer {name!r} does not return one tensor with the samples first, so it has no feature; name another"
        )
    return value if len(value) == num_samples else torch.unflatten(value, 0, (num_samples, -1))
