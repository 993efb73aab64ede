"""Files of the hub, fetched and pushed.

Where nobody answers, the cached copy is used; where there is none, the error comes at once.
`hf_hub_download` alone retries for half a minute before it says that there is no network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    repo_info,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError

from deradiff.text_files import read_json

TIMEOUT = 10.0
"""Seconds that the hub has to answer in."""

LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "hf_xet")
"""The packages whose errors say that the hub could not be read."""

NO_REPOSITORY = "there is none of that name, or it is private: look at it, or type hf auth login"

REMEDIES = {
    "GatedRepoError": "its owner asks for an agreement: accept it there, and type hf auth login",
    "RepositoryNotFoundError": NO_REPOSITORY,
    "DatasetNotFoundError": NO_REPOSITORY,
    "RevisionNotFoundError": "it has no such revision: look at the branch, tag or commit",
    "RemoteEntryNotFoundError": "it has no such file: look at the name",
}
"""What an error of the hub's client means, and what helps."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LOCAL_STARTS = (".", "/", "~", "runs/", "asset:")
"""How paths and assets begin that look like a hub id."""


def is_hub_id(text: str) -> bool:
    """Whether a name that is no local folder can be a hub id (`org/name`)."""
    return HUB_ID.fullmatch(text) is not None and not text.startswith(LOCAL_STARTS)


def is_hub_error(error: BaseException) -> bool:
    """Whether an error is one of the hub's client, or of what it asks through."""
    return type(error).__module__.partition(".")[0] in LIBRARIES


def not_fetched(what: str, repo: str, error: BaseException, argument: str) -> str:
    """One sentence about something that was wanted from the hub and did not come.

    Args:
        what: it is, in a few words.
        repo: the hub id.
        error: of the hub's client, or of `fetch` or `listing`.
        argument: that a local copy may be given as.
    """
    cause = error.__cause__ or error
    name = type(cause).__name__
    begin = f"{what} was wanted from the hub, {repo}"
    if name in REMEDIES:
        return f"{begin}, and {REMEDIES[name]} ({name})"
    return (
        f"{begin}, which did not answer, and no copy is here ({name}): "
        f"give {argument}=<the folder of a copy>, or set HF_HOME to a cache that "
        f"hf download {repo} has filled where there is a network"
    )


def fetch(repo: str, name: str, revision: str | None = None, repo_type: str | None = None) -> Path:
    """One file of a hub repository, in the cache.

    Args:
        repo: the hub id.
        name: the file's path in the repository.
        revision: a branch, tag or commit.
        repo_type: `dataset` for a data set's; None for a model's.

    Raises:
        OSError: where neither the hub nor the cache has it.
    """
    # One short question: is it there? The client alone would retry for half a minute.
    where: dict[str, Any] = {"revision": revision, "repo_type": repo_type}
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, **where), timeout=TIMEOUT)
    # No network, no such repository or file, no access: the hub's client has a class for each.
    except Exception as error:
        cached = try_to_load_from_cache(repo, name, **where)
        if isinstance(cached, str):
            return Path(cached)
        raise OSError(type(error).__name__) from error
    return Path(hf_hub_download(repo, name, **where))


def fetch_json(repo: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """The content of a JSON file of a hub repository. Raises OSError as `fetch` does."""
    return read_json(fetch(repo, name, revision))


def listing(
    repo: str, revision: str | None = None, repo_type: str | None = None
) -> tuple[str, list[str]]:
    """A hub repository and the files in it.

    Returns:
        The hub id and its files; without an answer, the cached copy's folder and its files.

    Raises:
        OSError: where neither is there.
    """
    # The hub's answer.
    try:
        info: Any = repo_info(repo, revision=revision, repo_type=repo_type, timeout=TIMEOUT)
        return repo, [file.rfilename for file in info.siblings or []]
    # Without one, the copy in its cache.
    except Exception as error:
        try:
            root = snapshot_download(
                repo, revision=revision, repo_type=repo_type, local_files_only=True
            )
        except OSError:
            raise OSError(type(error).__name__) from error
    files = [file for file in Path(root).rglob("*") if file.is_file()]
    return root, [file.relative_to(root).as_posix() for file in files]


def commit_of(file: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to; None for any other file.

    The cache's paths are `.../snapshots/<commit>/...`.
    """
    parts = file.parts
    if "snapshots" not in parts[:-2]:
        return None
    return parts[parts.index("snapshots") + 1]


def check_push(push_to: str) -> None:
    """Raises ValueError where an upload cannot work, long before there is something to upload.

    Args:
        push_to: the hub repository to upload to, `user/name`.
    """
    if not is_hub_id(push_to):
        raise ValueError(f"push_to={push_to} names no hub repository: give user/name")
    if get_token() is None:
        raise ValueError(f"push_to={push_to} needs an account: type hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str) -> str:
    """Upload a folder; the repository is made if it is not there.

    Args:
        folder: what is uploaded.
        repo: `user/name`.

    Returns:
        The repository's address.

    Raises:
        ValueError: where the hub refuses.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        message = "Anchor trained with deradiff"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{folder} is whole but was not uploaded to {repo}: {error}; "
            "the same command tries again"
        ) from error
    return address
