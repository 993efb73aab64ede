"""Where a data set is: a path, or an id of the hub, resolved to the parquet files of one split."""

from __future__ import annotations

import glob
from pathlib import Path

import datasets

from deradiff.hub import is_hub_error, is_hub_id, not_fetched


def parquet_files(path: str, split: str, revision: str | None = None) -> list[str] | None:
    """The parquet files of one split; no other split is read or downloaded.

    Args:
        path: a parquet file, a folder, or a data set of the hub (`org/name`).
        split: a split of the folder or of the data set.
        revision: a branch, tag or commit of the hub.

    Returns:
        Paths, or `hf://` addresses that hold the commit; None where the data set is not parquet
        (a folder of images, for example).

    Raises:
        ValueError: for a path or split that does not exist.
    """
    # On this disk.
    local = Path(path)
    if local.is_file():
        return [str(local)]
    if local.is_dir():
        if next(local.glob("**/*.parquet"), None) is None:
            return None
        # The name of a folder is no pattern, whatever brackets and stars it has.
        builder = datasets.load_dataset_builder("parquet", data_dir=glob.escape(str(local)))
        return _files_of_split(builder, path, split)

    # On the hub.
    if is_hub_id(path) and not path.endswith(".parquet"):
        builder = _hub_builder(path, revision)
        return _files_of_split(builder, path, split) if "parquet" in builder.name else None
    raise ValueError(
        f"path={path} does not exist: give a parquet file, a folder, "
        "or a data set of the hub such as org/name"
    )


def _hub_builder(path: str, revision: str | None) -> datasets.DatasetBuilder:
    """What reads a data set of the hub. Raises ValueError."""
    try:
        builder = datasets.load_dataset_builder(path, revision=revision)
    except Exception as error:
        is_missing = isinstance(error, datasets.exceptions.DatasetNotFoundError | ConnectionError)
        if not is_missing and not is_hub_error(error):
            raise
        raise ValueError(not_fetched("a data set", path, error, "path")) from error

    # A data set says itself where its files are, and could name files of this machine.
    for files in (builder.config.data_files or {}).values():
        for file in files:
            address = file.rpartition("::")[2]
            if "://" not in address or address.startswith(("file:", "local:")):
                raise ValueError(
                    f"path={path} names a file of this machine ({file}), which is not read: give "
                    "another data set"
                )
    return builder


def _files_of_split(builder: datasets.DatasetBuilder, path: str, split: str) -> list[str]:
    files = {str(name): list(paths) for name, paths in builder.config.data_files.items()}
    if split not in files:
        raise ValueError(
            f"split={split} is not in {path}, which has {', '.join(files)}: give one of these"
        )
    return files[split]
