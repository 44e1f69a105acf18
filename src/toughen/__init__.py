"""Toughen: make image classifiers robust to adversarial examples.

Adversarial training and criticality-leveraged adversarial training (CLAT) on top of it.
"""

__version__ = "0.1.0"

from toughen import criticality, data, models
from toughen.attacks import PGD, CrossEntropy, FeatureMatch, FeatureShift, KLToClean, Margin, fgsm_rs
from toughen.config import load_recipe
from toughen.criticality import CriticalityOptions, CriticalityReport, analyze
from toughen.engine import Trainer
from toughen.errors import InputError
from toughen.evaluation import evaluate, parse_attack
from toughen.layers import map_layers
from toughen.methods import AWP, CLAT, EMA, SWA, TWINS, CarryOver, CLATPaper, LoRA, RiFT, stack
from toughen.objectives import (
    ALP,
    MART,
    PGDAT,
    PGDATLSE,
    RST,
    TRADES,
    TRADESLSE,
    AdaptiveSmoothing,
    AutoLoRA,
    CleanCE,
    FastAT,
    FeatureAT,
    FreeAT,
    GradAlign,
)
from toughen.types import Batch, ThreatModel

__all__ = [
    "ALP",
    "AWP",
    "CLAT",
    "EMA",
    "MART",
    "PGD",
    "PGDAT",
    "PGDATLSE",
    "RST",
    "SWA",
    "TRADES",
    "TRADESLSE",
    "TWINS",
    "AdaptiveSmoothing",
    "AutoLoRA",
    "Batch",
    "CLATPaper",
    "CarryOver",
    "CleanCE",
    "CriticalityOptions",
    "CriticalityReport",
    "CrossEntropy",
    "FastAT",
    "FeatureAT",
    "FeatureMatch",
    "FeatureShift",
    "FreeAT",
    "GradAlign",
    "InputError",
    "KLToClean",
    "LoRA",
    "Margin",
    "RiFT",
    "ThreatModel",
    "Trainer",
    "analyze",
    "criticality",
    "data",
    "evaluate",
    "fgsm_rs",
    "load_recipe",
    "map_layers",
    "models",
    "parse_attack",
    "stack",
]
