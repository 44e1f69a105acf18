"""Attacks for the training loop: what is maximised (a goal) times how it is searched (a search).

All are training-grade: they always return a perturbed batch and leave the model exactly as found.
"""

from toughen.attacks.feature_match import FeatureMatch
from toughen.attacks.fgsm import fgsm_rs
from toughen.attacks.goals import (
    CrossEntropy,
    FeatureNorm,
    FeatureShift,
    Goal,
    KLToClean,
    LeastLikely,
    Margin,
    ProbabilityShift,
    SquaredError,
)
from toughen.attacks.pgd import PGD, Attack
from toughen.attacks.threat import gaussian_start

__all__ = [
    "PGD",
    "Attack",
    "CrossEntropy",
    "FeatureMatch",
    "FeatureNorm",
    "FeatureShift",
    "Goal",
    "KLToClean",
    "LeastLikely",
    "Margin",
    "ProbabilityShift",
    "SquaredError",
    "fgsm_rs",
    "gaussian_start",
]
