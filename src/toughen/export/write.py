"""Writing an exported folder: each format its files, and one card for all of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from toughen.durable import told, write_text
from toughen.errors import InputError, unknown
from toughen.export.card import model_card
from toughen.export.facts import Facts
from toughen.export.onnx import write_onnx
from toughen.export.robustbench import check_robustbench, write_robustbench
from toughen.models.exported import CONFIG, WEIGHTS

FORMATS = ("safetensors", "onnx", "robustbench")
CARD, ONNX = "README.md", "model.onnx"
_OURS = {CARD, ONNX, CONFIG, WEIGHTS, "model_info", "models", "new-model.md"}


def export(model: nn.Module, facts: Facts, weights: Path, folder: Path, *, formats: Sequence[str]) -> list[str]:
    """Write a network and its card into a folder.

    Args:
        model: The network, with the weights.
        facts: Of it.
        weights: The file of the checkpoint, safetensors.
        folder: New, empty, or of an earlier export.
        formats: Some of ``FORMATS``.

    Returns:
        What the user should know, a line each.

    Raises:
        InputError: An unknown format, a folder with other things in it or that can't be written to, or a format that
            this network does not have.
    """
    check_export(facts, folder, formats)
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files, notes = {CARD: "this card"}, []
    if "safetensors" in formats:
        with told(folder / WEIGHTS):
            shutil.copyfile(weights, folder / WEIGHTS)
        facts.network.write(folder)
        files |= {WEIGHTS: "the weights", CONFIG: "what `toughen.models.load` builds"}
    if "onnx" in formats:
        difference = write_onnx(model, folder / ONNX, image_shape=facts.network.image_shape)
        notes.append(f"{ONNX}: onnxruntime's logits differ from torch's by {difference:.1e} at most")
        files[ONNX] = "ONNX: `images` [batch, channels, height, width] in [0, 1] to `logits`"
    if "robustbench" in formats:
        written, unknown_entries = write_robustbench(model, facts, folder)
        notes.append(f"RobustBench's entry lacks {', '.join(unknown_entries)}: fill them in before you open the issue")
        files |= written
    if facts.license is None:
        notes.append("the card names no licence; choose one with --license, for example apache-2.0")
    write_text(folder / CARD, model_card(facts, files=files))
    return notes


def check_export(facts: Facts, folder: Path, formats: Sequence[str]) -> None:
    """Refuse what ``export`` could not do, before it writes anything; see there."""
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    if "robustbench" in formats:
        check_robustbench(facts)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder with --to")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OURS) if folder.is_dir() else []
    if others:
        raise InputError(f"{folder} holds other things, such as {others[0]}; give a new folder with --to")
