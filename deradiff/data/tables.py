"""The two tables that training reads: captioned images, and preference pairs in Pick-a-Pic's columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
IMAGE_COLUMNS = ("image", "caption")


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a parquet file whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from deradiff.runs import write_atomic

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_atomic(path, buffer.getvalue())


def write_pair_table(path: Path, first: list[bytes], second: list[bytes], label: list[float], captions: list[str]) -> None:
    """Pairs in Pick-a-Pic's columns. first, second: encoded images; label: 1 where the first is preferred, 0 the second, .5 a tie."""
    write_table(path, {"jpg_0": first, "jpg_1": second, "label_0": label, "label_1": [1 - x for x in label], "caption": captions})


def read_table(source: str, split: str, columns: tuple[str, ...], revision: str | None = None) -> Any:
    """A map-style `datasets.Dataset` of a parquet file, a folder of parquet files or of captioned images, or a hub id.

    A folder of images holds a metadata.jsonl with `file_name` and `caption`. Raises ValueError for a missing source or column.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_file():
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    elif path.is_dir():
        files = sorted(str(f) for f in path.glob("**/*.parquet"))
        kind, where = ("parquet", {"data_files": files}) if files else ("imagefolder", {"data_dir": str(path)})
        table = datasets.load_dataset(kind, split="train", **where)
    elif source.count("/") == 1 and not source.startswith((".", "/")) and not source.endswith(".parquet"):
        table = _from_hub(source, split, revision)
    else:
        raise ValueError(f"data.path {source} does not exist; give a parquet file, a folder, or a hub data set such as org/name")
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise ValueError(f"{source} lacks the column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    for column in columns:  # bytes are decoded by us, one image at a time, so that a broken one can be named
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _from_hub(source: str, split: str, revision: str | None) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except (HfHubHTTPError, datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"the data set {source} could not be read from the hub ({type(error).__name__}); "
            "give a mirror's id, or download one as parquet and give data.path=<folder>"
        ) from error


def decode(value: Any) -> Image.Image:
    """An RGB picture from encoded bytes, or from the record that `datasets` makes of an image. Raises OSError for broken bytes."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
    return Image.open(io.BytesIO(value)).convert("RGB")


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG, which loses nothing."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
