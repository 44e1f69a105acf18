"""Compiled forwards: the whole network in place, and the part of it that ends at the layers that an attack looks at."""

import weakref
from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx, nn

from toughen.layers.taps import has_hooks

Forward = Callable[[Tensor], dict[str, Tensor]]
_Shortened = tuple[object, Forward | None]  # the state of the model that it was made for, and None if there is none

_truncated: weakref.WeakKeyDictionary[nn.Module, dict[frozenset[str], _Shortened]] = weakref.WeakKeyDictionary()


def compile_forward(model: nn.Module) -> None:
    """Let ``torch.compile`` take over the forward of ``model``, in place; names and weights stay as they are.

    The first forward of each kind (eval or train mode, other shapes, other layers to be trained) takes up to a minute.
    Taps still see every layer, since they run the network as it was written; a copy of the model is not compiled.
    """
    model.compile()
    _truncated[model] = {}


def compiled_features(model: nn.Module, names: Collection[str]) -> Forward | None:
    """Return a compiled forward in eval mode to the outputs of the named layers, which leaves out what follows them.

    It is made anew when modules, their modes, or the weights of modules with parts were exchanged. Plain numbers that
    such modules keep are taken as they were when it was made.

    Returns:
        None where ``model`` is not compiled or carries hooks, or its forward can't be traced to these layers: it
        chooses its way by what it sees, or the layers are larger parts of it.
    """
    if model not in _truncated or any(map(has_hooks, model.modules())):
        return None
    known, wanted, state = _truncated[model], frozenset(names), _traced_state(model)
    if wanted not in known or known[wanted][0] != state:
        graph = _graph_to(model, wanted)
        known[wanted] = (state, None if graph is None else torch.compile(graph))
    return known[wanted][1]


def _traced_state(model: nn.Module) -> object:
    """What a trace takes over from the model. Modules without parts are called as they are at the time."""
    modules = [(weakref.ref(module), module.training) for module in model.modules()]
    parents = [module for module in model.modules() if next(module.children(), None) is not None]
    # the trace holds the tensors that it reads, so their ids are not given to others
    tensors = [id(t) for module in parents for t in (*module._parameters.values(), *module._buffers.values())]
    return modules, tensors


class _Tracer(fx.Tracer):
    """Sees every module without parts as one operation, our normalisation with its checks included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not list(m.children())


def _graph_to(model: nn.Module, names: Collection[str]) -> fx.GraphModule | None:
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a forward does that symbols can't: then it runs as it was written
        return None
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
    if sorted(str(node.target) for node in nodes) != sorted(names):
        return None
    outputs = {}
    for node in nodes:
        with graph.inserting_after(node):  # a copy, since what follows may write into it
            outputs[str(node.target)] = graph.call_method("clone", (node,)) if node is not nodes[-1] else node
    for node in reversed(graph.nodes):
        if node is nodes[-1]:
            break
        graph.erase_node(node)
    graph.output(outputs)
    return fx.GraphModule(model, graph)
