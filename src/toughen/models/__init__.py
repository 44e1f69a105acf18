"""Image classifiers built from a name. Owns architectures; knows nothing of data, attacks or training."""

# The families register themselves when they are imported.
from toughen.models import densenet, preact_resnet, rawrn, resnet, silu_wide_resnet, small_cnn, vgg, wide_resnet  # noqa: F401
from toughen.models.adaptive_smoothing import MixtureOptions, SmoothedMixture, mix
from toughen.models.create import check_spec, create, is_spec, model_names
from toughen.models.exported import Exported, is_exported, load
from toughen.models.fit import check_fit
from toughen.models.normalize import Normalize
from toughen.models.registry import MODELS
from toughen.models.weight_files import read_weights
from toughen.models.weights import fit_weights, load_weights, restore_weights

__all__ = [
    "MODELS",
    "Exported",
    "MixtureOptions",
    "Normalize",
    "SmoothedMixture",
    "check_fit",
    "check_spec",
    "create",
    "fit_weights",
    "is_exported",
    "is_spec",
    "load",
    "load_weights",
    "mix",
    "model_names",
    "read_weights",
    "restore_weights",
]
