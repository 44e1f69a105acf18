"""Only like beside like: refuses to put results into one column that were not measured alike."""

from collections.abc import Sequence
from typing import Any

from toughen.errors import InputError
from toughen.report.network import CHECKPOINTS, Checkpoint, Network


def common_attacks(networks: Sequence[Network]) -> tuple[str, ...]:
    """Return the attacks that the last checkpoint of every network has met, ``clean`` first.

    Raises:
        InputError: There are none, or two networks were trained for different threat models or evaluated on different
            images, with different settings, or with different seeds that their training does not explain.
    """
    first = networks[0]
    attacks = [attack for attack in first.last if all(attack in network.last for network in networks)]
    if not attacks:
        raise InputError("the runs have no attack in common; evaluate all with the same `toughen evaluate` call")
    by_training_seed: dict[int, Network] = {}
    for network in networks:
        if network.config["threat"] != first.config["threat"]:
            raise InputError(
                f"{network.path} and {first.path} were trained for different threat models "
                f"({_threat(network)}; {_threat(first)}); compare them apart"
            )
        twin = by_training_seed.setdefault(network.seed, network)
        for attack in attacks:
            for checkpoint in CHECKPOINTS:
                if attack in network.results(checkpoint):
                    _check_alike(attack, network, checkpoint, first)
                    _check_seed(attack, network, checkpoint, twin)
    return tuple(sorted(attacks, key=lambda attack: (attack != "clean", attack)))


def _check_alike(attack: str, network: Network, checkpoint: Checkpoint, first: Network) -> None:
    result, wanted = network.results(checkpoint)[attack], first.last[attack]
    names = f"{network.path} ({checkpoint}) and {first.path} (last)"
    same_order = "index" not in result or "index" not in wanted or result["index"] == wanted["index"]
    if result["images_sha256"] != wanted["images_sha256"] or result["n"] != wanted["n"] or not same_order:
        raise InputError(
            f"{names} were evaluated on different test images "
            f"({attack}: n {result['n']} of {network.config['data']['name']}, n {wanted['n']} of "
            f"{first.config['data']['name']}); compare them apart"
        )
    if result["settings"] != wanted["settings"]:
        raise InputError(
            f"{names} were not evaluated alike ({attack}: {_unlike(result['settings'], wanted['settings'])}); "
            "evaluate both with the same `toughen evaluate` call"
        )


def _check_seed(attack: str, network: Network, checkpoint: Checkpoint, twin: Network) -> None:
    """An evaluation takes the seed of its run: unlike seeds are in order only where training seeds are unlike too."""
    found, wanted = network.results(checkpoint)[attack]["seed"], twin.last[attack]["seed"]
    if found != wanted:
        raise InputError(
            f"{network.path} ({checkpoint}) and {twin.path} (last) were trained with one seed but evaluated with two "
            f"({attack}: {found} and {wanted}); evaluate both with the same `toughen evaluate` call"
        )


def _unlike(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that differs, with both values."""
    key = next(key for key in (*found, *wanted) if found.get(key) != wanted.get(key))
    one, other = found.get(key), wanted.get(key)
    if isinstance(one, dict) and isinstance(other, dict):
        return f"{key} {_unlike(one, other)}"
    return f"{key} {one} and {other}"


def _threat(network: Network) -> str:
    threat = network.config["threat"]
    return f"{threat.get('norm', 'linf')} eps {threat['eps']:.4g}"
