"""Training runs: the loop, its schedule, its checkpoints. Knows no recipe files and no command line."""

from toughen.engine import checkpoint
from toughen.engine.build import check_methods, create_model, training_loader
from toughen.engine.device import pick_device
from toughen.engine.recipe import EvaluateSettings, MixtureSettings, ModelSettings, Recipe, TrainSettings
from toughen.engine.trainer import Interrupted, Trainer

__all__ = [
    "EvaluateSettings",
    "Interrupted",
    "MixtureSettings",
    "ModelSettings",
    "Recipe",
    "TrainSettings",
    "Trainer",
    "check_methods",
    "checkpoint",
    "create_model",
    "pick_device",
    "training_loader",
]
