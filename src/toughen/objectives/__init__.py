"""Training objectives: how a batch is perturbed, and the loss on it. Each is one frozen dataclass in one file."""

from toughen.objectives.clean_ce import CleanCE
from toughen.objectives.feature_loss import feature_loss
from toughen.objectives.live import Live
from toughen.objectives.objective import METHODS, LiveObjective, Method, Objective
from toughen.objectives.pgd_at import PGDAT

__all__ = ["METHODS", "PGDAT", "CleanCE", "Live", "LiveObjective", "Method", "Objective", "feature_loss"]
