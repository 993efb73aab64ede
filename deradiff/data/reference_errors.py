"""The reference's errors, kept: with every random choice of a pair a function of (seed, epoch, example), what the frozen reference makes
of a pair is two numbers, whatever beta is. The first run writes them as it goes, and every other run reads them.

A store is a folder named by all that the numbers depend on. Each process appends to a file of its own, in records of a fixed size with a
checksum: a record that a kill tore is no record.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

RECORD = np.dtype(
    [("epoch", "<u4"), ("index", "<u4"), ("winner", "<f4"), ("loser", "<f4"), ("crc", "<u4")]
)
Place = tuple[int, int]  # (epoch, example)


class ReferenceErrors:
    """A store, opened: what other runs, and earlier sittings of this one, have left is read once, at the start."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        parts = [_read(file) for file in sorted(self.folder.glob("*.bin"))]
        known = np.concatenate(parts) if parts else np.empty(0, RECORD)
        self.places, first = np.unique(_place(known["epoch"], known["index"]), return_index=True)
        self.errors = np.stack([known["winner"][first], known["loser"][first]])
        self.file = self.folder / f"{uuid.uuid4().hex}.bin"
        self.pending: tuple[list[Place], Tensor] | None = None

    def get(self, places: list[Place]) -> Tensor:
        """(2, B) float32 errors of the winner and the loser; NaN where a pair is not known."""
        found = torch.full((2, len(places)), torch.nan)
        if len(self.places):
            wanted = _place(*np.array(places, dtype=np.int64).T)
            at = np.searchsorted(self.places, wanted).clip(max=len(self.places) - 1)
            known = self.places[at] == wanted
            found[:, torch.from_numpy(known)] = torch.from_numpy(self.errors[:, at[known]])
        return found

    def covers(self, epochs: np.ndarray, indices: np.ndarray) -> bool:
        """Whether every one of these places is known, so that a run needs no reference network."""
        return bool(np.isin(_place(epochs, indices), self.places).all())

    def add(self, places: list[Place], errors: Tensor) -> None:
        """Keep (2, B) errors, on any device. They are written one call later, when the device has long finished them: no step waits."""
        self.flush()
        self.pending = (places, errors.detach())

    def flush(self) -> None:
        """Write what `add` holds back."""
        if self.pending is None:
            return
        (places, errors), self.pending = self.pending, None
        winner, loser = errors.float().cpu().numpy()
        records = np.zeros(len(places), RECORD)
        records["epoch"], records["index"] = np.array(places).T
        records["winner"], records["loser"] = winner, loser
        records = records[np.isfinite(winner) & np.isfinite(loser)]
        records["crc"] = [_checksum(r) for r in records]
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, records.tobytes())
        finally:
            os.close(handle)


def reference_key(
    reference: str,
    encodings: str,
    noising: str,
    seed: int,
    caption_dropout: float,
    flip: bool,
    precision: str,
) -> str:
    """All that the errors depend on. reference: digest of the reference's weights, its precision in them; encodings: `encodings_key` of
    data and encoders; noising: its `key`; seed, caption_dropout and flip fix a pair's random choices; precision: of the computation."""
    return f"1/{reference}/{encodings}/{noising}/{seed}/{caption_dropout}/{flip}/{precision}"


def network_digest(network: nn.Module) -> str:
    """A digest of a network's weights, whatever folder or revision they came from; of one with adapters, those of its base."""
    digest = hashlib.sha256()
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _place(epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    return (epoch.astype(np.int64) << 32) | index.astype(np.int64)


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[: -RECORD["crc"].itemsize])


def _read(file: Path) -> np.ndarray:
    """The whole records of a file; it is aligned by size, as only the last can be torn, and nothing follows it in a file of its own."""
    data = file.read_bytes()
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
    return records[[_checksum(r) == r["crc"] for r in records]] if len(records) else records
