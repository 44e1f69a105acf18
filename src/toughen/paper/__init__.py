"""The tables and figures of the paper, each as something that can be run: its values, its networks, and ours beside."""

from toughen.paper.figures import FIGURES
from toughen.paper.fill import Filled, draw_figure, fill
from toughen.paper.measure import Bench
from toughen.paper.networks import PUBLISHED, Network, networks
from toughen.paper.plan import Piece, Plan, make_plan, pieces, sweep_document
from toughen.paper.scales import SCALES, Scale
from toughen.paper.values import PaperRow, paper_rows

__all__ = [
    "FIGURES",
    "PUBLISHED",
    "SCALES",
    "Bench",
    "Filled",
    "Network",
    "PaperRow",
    "Piece",
    "Plan",
    "Scale",
    "draw_figure",
    "fill",
    "make_plan",
    "networks",
    "paper_rows",
    "pieces",
    "sweep_document",
]
