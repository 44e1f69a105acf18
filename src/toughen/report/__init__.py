"""What runs have to tell: tables and figures, read from run folders alone. Knows no torch."""

from toughen.report.figures import plot_criticality, plot_report, plot_training
from toughen.report.tables import comparison_table

__all__ = ["comparison_table", "plot_criticality", "plot_report", "plot_training"]
