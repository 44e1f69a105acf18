"""Image classifiers built from a name. Owns architectures; knows nothing of data, attacks or training."""

# The families register themselves when they are imported.
from toughen.models import preact_resnet, resnet, small_cnn  # noqa: F401
from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS, create

__all__ = ["MODELS", "Normalize", "create"]
