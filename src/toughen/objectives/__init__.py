"""Training objectives: how a batch is perturbed, and the loss on it. Each is one frozen dataclass in one file."""

from toughen.objectives.adaptive_smoothing import AdaptiveSmoothing
from toughen.objectives.alp import ALP
from toughen.objectives.autolora import AutoLoRA
from toughen.objectives.clean_ce import CleanCE
from toughen.objectives.fast_at import FastAT
from toughen.objectives.feature_at import FeatureAT
from toughen.objectives.feature_loss import feature_loss
from toughen.objectives.free_at import FreeAT
from toughen.objectives.grad_align import GradAlign
from toughen.objectives.live import Live
from toughen.objectives.mart import MART
from toughen.objectives.objective import METHODS, LiveObjective, Method, Objective
from toughen.objectives.pgd_at import PGDAT
from toughen.objectives.rst import RST
from toughen.objectives.score import PGDATLSE, TRADESLSE
from toughen.objectives.trades import TRADES

__all__ = [
    "ALP",
    "MART",
    "METHODS",
    "PGDAT",
    "PGDATLSE",
    "RST",
    "TRADES",
    "TRADESLSE",
    "AdaptiveSmoothing",
    "AutoLoRA",
    "CleanCE",
    "FastAT",
    "FeatureAT",
    "FreeAT",
    "GradAlign",
    "Live",
    "LiveObjective",
    "Method",
    "Objective",
    "feature_loss",
]
