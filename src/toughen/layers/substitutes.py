"""Which names ``functional_call`` is to be given, so that a module sees other tensors in the place of its weights."""

from collections.abc import Mapping

from torch import Tensor, nn


def substitutes(module: nn.Module, tensors: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the substitute of each weight under the name of every place that reads it, each place once.

    Give them to ``functional_call`` with ``tie_weights=False``: torch's own tying leaves its substitute in a module
    that is registered under two names.

    Args:
        module: Whose weights they are.
        tensors: What stands in the place of which parameter.
    """
    return {
        f"{prefix}.{name}" if prefix else name: tensors[weight]
        for prefix, part in module.named_modules()
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False)
        if weight in tensors
    }
