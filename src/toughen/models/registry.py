"""The architectures that come with the package, by name; each family registers itself."""

from typing import Protocol

from torch import nn

from toughen.models.normalize import Normalize
from toughen.registry import Registry


class Builder(Protocol):
    """A function that builds one architecture; its default ``width`` is that of the published network."""

    def __call__(self, *, num_classes: int, normalize: Normalize, width: int = ...) -> nn.Module:
        """Build the network with ``normalize`` as its first submodule; the stem takes its channels."""


MODELS: Registry[Builder] = Registry("model")
