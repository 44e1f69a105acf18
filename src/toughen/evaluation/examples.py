"""A few images to look at: as they are, as an attack makes them, and what the model says of both."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from toughen.durable import told
from toughen.evaluation.evaluate import as_evaluated
from toughen.evaluation.suites import EvalAttack, Search
from toughen.rng import generator
from toughen.types import Batch


def keep_examples(
    model: nn.Module, batch: Batch, classes: Sequence[str], attacks: Sequence[EvalAttack], file: Path, *, seed: int
) -> None:
    """Write what the first search among ``attacks`` makes of a few images; nothing where none of them searches.

    The file holds ``x`` and ``x_adv`` [N, C, H, W], float32, in [0, 1], and ``label``, ``predicted`` and
    ``predicted_adv`` [N], int64; ``about`` in its metadata is JSON: the name of the ``attack``, and the ``classes``.

    Args:
        model: Left as found.
        batch: The images, on the model's device.
        classes: The names of the labels.
        attacks: Of an evaluation.
        file: Where to, safetensors.
        seed: Of the attack's random draws.

    Raises:
        InputError: The file can't be written.
    """
    searches = [found for attack in attacks for found in attack.stages]
    if not searches:
        return
    name, search = searches[0]
    with as_evaluated(model):
        tensors = _shown(model, batch, search, seed)
    # one entry, since safetensors writes several in any order, and equal runs are to have equal files
    metadata = {"about": json.dumps({"attack": name, "classes": list(classes)})}
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    with told(file):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def _shown(model: nn.Module, batch: Batch, search: Search, seed: int) -> dict[str, torch.Tensor]:
    x, y = batch.x, batch.y
    x_adv = search(model, x, y, generator=generator(seed, "examples", device=x.device)).detach()
    with torch.no_grad():
        predicted, predicted_adv = (model(images).argmax(1) for images in (x, x_adv))
    return {"x": x, "x_adv": x_adv, "label": y, "predicted": predicted, "predicted_adv": predicted_adv}
