"""What runs have to tell: tables and figures, read from run folders alone. Knows no torch."""

from toughen.report.comparison import Comparison, compare_runs
from toughen.report.figures import plot_criticality, plot_report, plot_strength, plot_training, plot_transfer
from toughen.report.page import report_page
from toughen.report.tables import comparison_tables

__all__ = [
    "Comparison",
    "compare_runs",
    "comparison_tables",
    "plot_criticality",
    "plot_report",
    "plot_strength",
    "plot_training",
    "plot_transfer",
    "report_page",
]
