"""Files of the hub, fetched and pushed. Where nobody answers, the cached copy serves; where there is none, the error comes at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TIMEOUT = 10.0  # seconds that the hub has to answer in


def is_hub_id(text: str) -> bool:
    """Whether a name that is no local folder can be `org/name` of the hub."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~", "runs/", "asset:"))


def fetch(repo: str, name: str, revision: str | None = None, repo_type: str | None = None) -> Path:
    """One file of a hub repository, in the cache; repo_type: `dataset` for a data set's. Raises OSError where the hub does not give it
    and the cache does not hold it."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    where: dict[str, Any] = {"revision": revision, "repo_type": repo_type}
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, **where), timeout=TIMEOUT)
    except Exception as error:  # no network, no such repository or file, no access: the hub's client has a class of its own for each
        cached = try_to_load_from_cache(repo, name, **where)
        if isinstance(cached, str):
            return Path(cached)
        raise OSError(type(error).__name__) from error
    return Path(hf_hub_download(repo, name, **where))


def fetch_json(repo: str, name: str, revision: str | None = None) -> dict[str, Any]:
    return json.loads(fetch(repo, name, revision).read_text())


def listing(
    repo: str, revision: str | None = None, repo_type: str | None = None
) -> tuple[str, list[str]]:
    """A hub repository's id and its files; without an answer, the cached copy's folder and its files. Raises OSError where neither is."""
    from huggingface_hub import repo_info, snapshot_download

    try:
        info: Any = repo_info(repo, revision=revision, repo_type=repo_type, timeout=TIMEOUT)
        return repo, [file.rfilename for file in info.siblings or []]
    except Exception as error:
        try:
            root = snapshot_download(
                repo, revision=revision, repo_type=repo_type, local_files_only=True
            )
        except OSError:
            raise OSError(type(error).__name__) from error
    return root, [
        file.relative_to(root).as_posix() for file in Path(root).rglob("*") if file.is_file()
    ]


def commit_of(file: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to: `.../snapshots/<commit>/...`; None for any other file."""
    parts = file.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


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
