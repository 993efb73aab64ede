"""Where a data set lies: a path of this machine, or an id of the hub, resolved to the parquet files of one split."""

from __future__ import annotations

from pathlib import Path

from deradiff.hub import is_hub_id


def parquet_files(source: str, split: str, revision: str | None = None) -> list[str] | None:
    """The files (paths, or hf:// addresses with their commit) of a split; None where the source is no parquet: a folder of images, say.

    Only this split is ever read or downloaded. Raises ValueError for a source or split that is not there.
    """
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return (
            _split_of(source, split, data_dir=str(path))
            if next(path.glob("**/*.parquet"), None)
            else None
        )
    if is_hub_id(source) and not source.endswith(".parquet"):
        return _from_hub(source, split, revision)
    raise ValueError(
        f"data.path {source} does not exist; give a parquet file, a folder, or a hub data set such as org/name"
    )


def _from_hub(source: str, split: str, revision: str | None) -> list[str] | None:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        builder = datasets.load_dataset_builder(source, revision=revision)
    except (HfHubHTTPError, datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"the data set {source} could not be read from the hub ({type(error).__name__}); "
            "give a mirror's id, or download one as parquet and give data.path=<folder>"
        ) from error
    return (
        _named_split(builder.config.data_files, source, split)
        if "parquet" in builder.name
        else None
    )


def _split_of(source: str, split: str, data_dir: str) -> list[str]:
    import datasets

    return _named_split(
        datasets.load_dataset_builder("parquet", data_dir=data_dir).config.data_files, source, split
    )


def _named_split(files: dict[str, list[str]], source: str, split: str) -> list[str]:
    by_name = {str(name): list(found) for name, found in files.items()}
    if split not in by_name:
        raise ValueError(
            f"{source} has no split {split}; it has {', '.join(by_name)}: give data.split=<one of them>"
        )
    return by_name[split]
