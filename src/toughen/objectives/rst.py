"""Robust self-training (Carmon et al. 2019): TRADES on labelled images and on extra ones labelled by a model."""

from dataclasses import dataclass
from typing import ClassVar

from toughen.objectives.objective import METHODS
from toughen.objectives.settings import smoothed_label
from toughen.objectives.trades import TRADES


@METHODS.register("rst")
@dataclass(frozen=True, kw_only=True)
class RST(TRADES):
    """TRADES with extra images: E CE(F(x), y) + beta * KL(p(x) || p(x')), without CE where there is no label (-1).

    The loss and its defaults are those of TRADES. What makes it RST are extra images (``data.extra``), half of each
    batch of 256 in the paper: with the labels that an ordinarily trained network gives them, or with none.

    Args:
        beta: As in ``TRADES``.
        label_smoothing: As in ``TRADES``.
        start: As in ``TRADES``.
        target_grad: As in ``TRADES``.
    """

    needs_extra: ClassVar[bool] = True

    @property
    def label(self) -> str:  # type: ignore[override]  # as in TRADES
        """``"RST"``, or for example ``"RST (label smoothing 0.1)"``."""
        return smoothed_label("RST", self.label_smoothing)
