"""An anchor folder as a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path


def check_push(repo: str) -> None:
    """Raises ValueError, long before there is something to upload, for a name that is none and where nobody is logged in."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"hub.push_to={repo} names no hub repository: give user/name")
    if get_token() is None:
        raise ValueError(
            f"hub.push_to={repo} needs an account: type hf auth login, or set HF_TOKEN"
        )


def push(folder: Path, repo: str) -> str:
    """Upload a folder, whose repository is made if it is not there; returns its address. Raises ValueError where the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Anchor trained with deradiff"
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{folder} is whole but was not uploaded to {repo}: {error}; the same command tries again"
        ) from error
    return address
