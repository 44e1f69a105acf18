"""A search recorded once as a CUDA graph and replayed: the host starts it with one call instead of thousands."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

Search = Callable[..., tuple[Tensor, Tensor]]

# each recording keeps the memory that its search needed
KEPT = 2
_recordings: WeakKeyDictionary[nn.Module, "OrderedDict[Hashable, _Recording]"] = WeakKeyDictionary()


def can_record(x: Tensor) -> bool:
    """Whether what is computed from ``x`` can be recorded: it lies on a CUDA device."""
    return x.is_cuda


def recorded(model: nn.Module, key: Hashable, search: Search, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``search(*tensors)``, from a recording where there is one for this model, key and kind of tensors.

    A recording reads weights and buffers where they lie, so it goes on being right when they are changed in place, and
    is made anew when they, or modules, were exchanged.

    Args:
        model: What the search looks at, on a CUDA device; the latest ``KEPT`` recordings of it are kept.
        key: Everything else that the search depends on.
        search: Computes two tensors from ``tensors`` and the model alone; it neither draws random numbers nor waits for
            the device.
        tensors: Its inputs, on that device.
    """
    kept = _recordings.setdefault(model, OrderedDict())
    modules = tuple(ref(module) for module in model.modules())  # some have no weights
    held = (*model.parameters(), *model.buffers())
    places = tuple((tensor.data_ptr(), _kind(tensor)) for tensor in held)
    kinds = tuple(_kind(tensor) for tensor in tensors)
    casts = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    whole = (key, modules, places, kinds, casts)
    if whole not in kept:
        kept[whole] = _Recording(search, tensors)
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(whole)
    return kept[whole].replay(tensors)


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.stride()


class _Recording:
    """One CUDA graph with the tensors that it reads and writes."""

    def __init__(self, search: Search, tensors: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are chosen and compiled before, since a graph can't record that
                search(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = search(*self.inputs)

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        for held, tensor in zip(self.inputs, tensors, strict=True):
            held.copy_(tensor)
        self.graph.replay()
        x_adv, value = (output.clone() for output in self.outputs)
        return x_adv, value
