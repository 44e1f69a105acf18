"""What a forward does, seen from outside: who runs, how large its tensors are, and whose rows belong to which sample.

Knows names and tensors; what counts as a layer is decided elsewhere.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from toughen.layers.taps import buffers_kept, mode, random_state_kept, tap

Side = Literal["input", "output"]
See = Callable[[Side, str, Any], None]


class Trace:
    """One forward in eval mode, or two where the order of rows must be seen; the model is left as found.

    Args:
        model: Any module.
        names: Qualified names of the submodules to watch.
        example: [B, ...] images in [0, 1]; the first one is used.

    Attributes:
        calls: How often each watched module was called, in the order in which their first calls ended.
        num_features: Elements of the output for one sample; missing where the samples don't come first.
        num_inputs: Elements of the first argument for one sample, likewise.
        norm_of: The batch norm that directly takes a watched output.
        norm_calls: How often each batch norm was called.
        num_logits: The last dimension of what the model returns; None if that is no tensor.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], example: Tensor) -> None:
        self.model = model
        self.calls: Counter[str] = Counter()
        self.norm_of: dict[str, str] = {}
        self.norm_calls: Counter[str] = Counter()
        self._sizes: dict[tuple[Side, str], int] = {}
        self._rows = _Rows()
        self._outputs: list[tuple[str, ref[Tensor], int]] = []
        norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
        a = example[:1]
        with tap(model, norms, self._see_norm, side="input"):
            logits = self._forward(torch.cat([a, a]), names, self._see_twice)
        self.num_logits = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else None
        if self._rows.doubtful:
            b = (a + 0.5) % 1  # differs from a in every pixel, and is an image where a is one
            self._forward(torch.cat([a, b]), {name for _, name in self._rows.doubtful}, self._rows.see_other)
        sizes = {key: size for key, size in self._sizes.items() if key not in self._rows.mixed()}
        self.num_features = {name: size for (side, name), size in sizes.items() if side == "output"}
        self.num_inputs = {name: size for (side, name), size in sizes.items() if side == "input"}

    def _forward(self, pair: Tensor, names: Iterable[str], see: See) -> Any:
        names = tuple(names)
        with (
            torch.inference_mode(False),  # tensors of inference mode don't tell whether they were changed
            torch.no_grad(),
            mode(self.model, training=False),
            buffers_kept(self.model),
            random_state_kept(self.model),
            tap(self.model, names, partial(see, "input"), side="input"),
            tap(self.model, names, partial(see, "output")),
        ):
            return self.model(pair)

    def _see_twice(self, side: Side, name: str, value: Any) -> None:
        self._rows.see_twice(side, name, value)
        if isinstance(value, Tensor):
            self._sizes.setdefault((side, name), value.numel() // 2)
        if side == "output":
            self.calls[name] += 1
            if isinstance(value, Tensor):
                self._outputs.append((name, ref(value), value._version))

    def _see_norm(self, norm: str, value: Any) -> None:
        self.norm_calls[norm] += 1
        for name, output, version in self._outputs:
            # a version that moved on: an activation in between has changed the output in place
            if isinstance(value, Tensor) and output() is value and value._version == version:
                self.norm_of.setdefault(name, norm)


class _Rows:
    """Whether the first dimension holds the samples, or w rows of each sample one after the other (windows do).

    The second is not guessed from the shape. With two equal samples both halves must be equal; and with another second
    sample the first half must stay as it is, and the second must move. Rows in any other order fail.
    """

    def __init__(self) -> None:
        self.doubtful: defaultdict[tuple[Side, str], list[Tensor]] = defaultdict(list)
        self._mixed: set[tuple[Side, str]] = set()

    def see_twice(self, side: Side, name: str, value: Any) -> None:
        """Look at a tensor of a forward of twice the same sample."""
        if isinstance(value, Tensor) and value.shape[:1] == (2,):
            return
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() and len(value) % 2 == 0:
            first, second = value.chunk(2)
            if value.numel() and _same(second, first):
                self.doubtful[side, name].append(first.clone())
                return
        self._mixed.add((side, name))

    def see_other(self, side: Side, name: str, value: Tensor) -> None:
        """Look at the same tensor of a forward in which the second sample is another one."""
        if not self.doubtful[side, name]:
            return
        expected = self.doubtful[side, name].pop(0)
        first, second = value[: len(expected)], value[len(expected) :]
        if not first.shape == second.shape == expected.shape or not _same(first, expected) or _same(second, expected):
            self._mixed.add((side, name))

    def mixed(self) -> set[tuple[Side, str]]:
        """The tensors whose first dimension is anything else."""
        return self._mixed | {key for key, unseen in self.doubtful.items() if unseen}


def _same(tensor: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree up to what kernels may round differently."""
    tolerance = float(torch.finfo(tensor.dtype).eps ** 0.5 * expected.abs().max())
    return bool((tensor - expected).abs().max() <= tolerance)
