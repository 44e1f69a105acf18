"""RobustBench's form: the JSON of an entry, its weights as a torch state dict, and the text of the issue to open.

The facts are those of github.com/RobustBench/robustbench at 78fcc9e (2025-03-31): README.md, "Adding a new model";
``robustbench/utils.py``, ``ModelInfo`` and ``update_json``; ``.github/ISSUE_TEMPLATE/new-model.md``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toughen.durable import told, write_text
from toughen.errors import InputError
from toughen.export.card import eps_text
from toughen.export.facts import Facts

# how many test images an entry is measured on
NUM_TEST = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
THREATS = {"linf": "Linf", "l2": "L2"}


def check_robustbench(facts: Facts) -> None:
    """Refuse a network that RobustBench has no table for.

    Raises:
        InputError: What its tables are about.
    """
    if facts.network.data not in NUM_TEST:
        raise InputError(
            f"RobustBench has tables for {', '.join(NUM_TEST)}, and this network was trained on {facts.network.data};"
            " leave robustbench out of --format"
        )


def write_robustbench(model: nn.Module, facts: Facts, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Write ``model_info/DATA/THREAT/NAME.json``, ``models/DATA/THREAT/NAME.pt`` and ``new-model.md`` into a folder.

    Args:
        model: The network; images in [0, 1] go in, as RobustBench wants it, and its statistics are buffers.
        facts: Of it.
        folder: To write into.

    Returns:
        The files, each with what it is; and the entries that nobody but the user knows, which are null.

    Raises:
        InputError: It can't be written.
    """
    where = Path(facts.network.data) / THREATS[facts.network.norm]
    entry = robustbench_entry(facts)
    info, weights = Path("model_info") / where / f"{facts.name}.json", Path("models") / where / f"{facts.name}.pt"
    for file in (info, weights):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / info, json.dumps(entry, indent=2) + "\n")
    with told(folder / weights):
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, folder / weights)
    write_text(folder / "new-model.md", _issue(facts, entry, weights))
    files = {
        str(info): "RobustBench's entry",
        str(weights): "its weights, a torch state dict with the statistics of normalisation among the buffers",
        "new-model.md": "the issue to open at github.com/RobustBench/robustbench",
    }
    return files, [name for name, value in entry.items() if value is None]


def robustbench_entry(facts: Facts) -> dict[str, Any]:
    """Return the entry; what only the user knows, or was not measured as RobustBench does, is None."""
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": facts.extra_data,
        "number_forward_passes": 1,
        "dataset": facts.network.data,
        "venue": None,
        "architecture": facts.network.model,
        "eps": eps_text(facts.network.eps),
        "clean_acc": _percent(facts, "clean"),
        "reported": None,
        "autoattack_acc": _percent(facts, "standard"),
        "unreliable": False if "standard" in facts.evaluations and not _flags(facts) else None,
    }


def _percent(facts: Facts, attack: str) -> str | None:
    """An accuracy in RobustBench's form, if it was measured on its number of images."""
    found = facts.evaluations.get(attack)
    if found is None or found["n"] != NUM_TEST[facts.network.data]:
        return None
    return str(round(100 * found["accuracy"], 2))


def _flags(facts: Facts) -> list[Any]:
    return [flag for found in facts.evaluations.values() for flag in found["flags"]]


def _issue(facts: Facts, entry: dict[str, Any], weights: Path) -> str:
    network = facts.network
    size = "" if network.width is None else f", first stage of {network.width} channels"
    statistics = "" if network.mean is None else f"; normalises with mean {network.mean} and std {network.std}"
    return (
        f"# Paper Information\n\n- **Paper Title**:\n- **Paper URL**:\n- **Paper authors**:\n\n"
        f"# Leaderboard Claim(s)\n\n## Model 1\n\n"
        f"- **Architecture**: {network.model}{size}{statistics}\n"
        f"- **Threat Model**: {THREATS[network.norm]}\n"
        f"- **eps**: {entry['eps']}\n"
        f"- **Clean accuracy**: {entry['clean_acc'] or ''}\n"
        f"- **Robust accuracy**: {entry['autoattack_acc'] or ''}\n"
        f"- **Additional data**: {str(facts.extra_data).lower()}\n"
        f"- **Evaluation method**: AutoAttack, standard\n"
        f"- **Checkpoint and code**: {weights}\n\n"
        "# Model Zoo:\n\n"
        "- [ ] I want to add my models to the Model Zoo (check if true)\n"
        "- [ ] I use an architecture that is included among those of RobustBench or in `timm`. If not, I added the link"
        " to the architecture implementation so that it can be added.\n"
        "- [ ] I agree to release my model(s) under MIT license (check if true) **OR** under a custom license, located"
        " here:\n"
    )
