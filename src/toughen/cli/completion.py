"""Shell completion: ``toughen --print-completion bash``. The script is static, since a shell can't wait for torch."""

import argparse
from collections.abc import Iterator

import shtab

from toughen.config import recipe_names

_BY_METAVAR = {
    "FILE": shtab.FILE,
    "TARGET": shtab.FILE,
    "DIR": shtab.DIRECTORY,
    "RUN": shtab.DIRECTORY,
}


def offer_completion(parser: argparse.ArgumentParser) -> None:
    """Add ``--print-completion SHELL``: of the verbs, their options and choices, recipes, files and folders."""
    for action in _actions(parser):
        if action.dest == "words":
            action.complete = _RECIPE  # type: ignore[attr-defined]  # how shtab is told
        elif action.metavar in _BY_METAVAR:
            action.complete = _BY_METAVAR[action.metavar]  # type: ignore[attr-defined]
    names = " ".join(recipe_names())
    preamble = {
        "bash": f'_toughen_recipe() {{ compgen -W "{names}" -- "$1"; _shtab_compgen_files "$1"; }}',
        "zsh": f"_toughen_recipe() {{ compadd {names}; _files }}",
        "fish": f"function _toughen_recipe; string split ' ' '{names}'; __fish_complete_path (commandline -ct); end",
    }
    shtab.add_argument_to(parser, help="print what completes this command in a shell", preamble=preamble)


_RECIPE = {**shtab.FILE, "bash": "_toughen_recipe", "zsh": "_toughen_recipe", "fish": "(_toughen_recipe)"}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
