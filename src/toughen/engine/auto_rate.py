"""The automatic learning rate of AutoLoRA (Xu et al. 2024): when to halve it, from the validation accuracies so far.

Knows neither models nor optimizers, and keeps no state: a resumed run finds the same answer from its log.
"""

from collections.abc import Sequence

CHECKPOINTS = (0.32, 0.48, 0.56, 0.72, 0.80, 0.84, 0.88, 0.92, 0.96)
"""When the rate may change, as shares of the run: after 16, 24, 28, 36, 40, 42, ... of the published 50 epochs."""

RHO = 0.75
"""The share of the epochs between two checkpoints that must improve for the rate to stay."""


def checkpoints(epochs: int) -> tuple[int, ...]:
    """Return after how many epochs, of a run of ``epochs``, the rate may be halved."""
    places = {round(share * epochs) for share in CHECKPOINTS}
    return tuple(sorted(place for place in places if 0 < place < epochs))


def halvings(accuracies: Sequence[float], epochs: int) -> list[int]:
    """Return after which epochs the learning rate is to be halved, and the best weights so far to be taken up again.

    At a checkpoint the rate is halved if (i) fewer than 0.75 of the epochs since the last checkpoint were better than
    the one before them, or (ii) neither the rate nor the best accuracy has changed since then. So the rate after n
    epochs is the first one times ``0.5 ** len(halvings(accuracies[:n], epochs))``, and epoch n itself is in the list
    when the weights are to be reloaded now. What is decided once never changes as accuracies are added.

    Differences from the official code: it decides one epoch later, where it compares accuracies that are all measured;
    here the first epoch counts as better than the untrained start, as the paper's formula has it. And it compares the
    rate with a copy made after the last decision, so that it never finds it changed; here it does, as in the rule of
    APGD (Croce and Hein 2020), from which the paper takes its own.

    Args:
        accuracies: Robust validation accuracy after epoch 1, 2, ..., in any unit.
        epochs: Length of the whole run.
    """
    found: list[int] = []
    last = 0
    for place in checkpoints(epochs):
        if place > len(accuracies):
            break
        window = range(last, place)
        improved = sum(epoch == 0 or accuracies[epoch] > accuracies[epoch - 1] for epoch in window)
        rate_stayed = last not in found
        best_stayed = last > 0 and max(accuracies[:place]) <= max(accuracies[:last])
        if improved < RHO * len(window) or (rate_stayed and best_stayed):
            found.append(place)
        last = place
    return found
