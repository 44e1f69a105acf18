"""Pushing an exported folder to the Hugging Face hub, with the token that is there."""

import re
from pathlib import Path

from toughen.errors import InputError, first_line


def check_hub(repository: str) -> None:
    """Refuse what can't be pushed to, before the work.

    Raises:
        InputError: The name is not one, or there is no token.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"--push-to-hub is {repository!r}; it must be OWNER/NAME, as in hub addresses")
    from huggingface_hub import get_token  # slow to import

    if get_token() is None:
        raise InputError(
            "no token for the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to a token with write access, made"
            " under Settings, Access Tokens, on huggingface.co"
        )


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository, which is made if it is not there.

    Args:
        folder: All of its files are uploaded.
        repository: ``OWNER/NAME``.
        private: Whether a repository that is made can be seen by its owner alone.

    Returns:
        The address of the repository.

    Raises:
        InputError: The hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi

    check_hub(repository)
    hub = HfApi()
    try:
        made = hub.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by toughen export")
    except Exception as error:  # the hub's refusals, and whatever the network fails with
        raise InputError(
            f"can't push to {repository}: {first_line(error)}; {folder} is complete, so the same command tries again"
        ) from error
    return str(made)
