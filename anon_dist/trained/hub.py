"""Upload to the Hugging Face hub, with the user's own token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anon_dist.checkpoint import CheckpointError


def hub() -> Any:
    """The hub, for whoever is logged in.

    Raises:
        CheckpointError: nobody is.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise CheckpointError(
            "--push needs a token of the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    return HfApi(token=token)


def push(folder: Path, repository: str, private: bool, api: Any) -> str:
    """Upload a folder to a repository, which is made if there is none.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached; the folder stays.
    """
    try:
        api.create_repo(repository, repo_type="model", private=private or None, exist_ok=True)
        done = api.upload_folder(
            folder_path=str(folder), repo_id=repository, repo_type="model", commit_message=f"Upload {folder.name}"
        )
    except Exception as error:  # the hub's client raises its own, its HTTP client's, and OSError
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"--push {repository}: {type(error).__name__}: {text}; {folder} is complete, and can be uploaded with `hf upload {repository} "
            f"{folder}`"
        ) from None
    return str(getattr(done, "commit_url", done))
