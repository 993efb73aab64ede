"""The reference's errors, kept on disk.

Every random choice of a pair is a function of (seed, epoch, example). So the frozen reference's
errors on a pair are two numbers, the same for every beta. The first run writes them as it goes,
every other run reads them.

A store is a folder named by all that the numbers depend on. Each process appends to a file of its
own, in records of a fixed size with a checksum: a record that a kill has cut is not read.
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

from deradiff.data.pairs import EpochIndex

RECORD = np.dtype(
    [("epoch", "<u4"), ("index", "<u4"), ("winner", "<f4"), ("loser", "<f4"), ("crc", "<u4")]
)


HELD_BACK = 64
"""Batches whose errors are kept on the device before they are written."""


class ReferenceErrors:
    """A store. What it holds is read once, when it is opened.

    Args:
        root: folder of all stores.
        key: a text that names all that the errors depend on (`reference_key`).

    Attributes:
        folder: of this store.
        file: the file that this process appends to.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.file = self.folder / f"{uuid.uuid4().hex}.bin"
        parts = [_read_records(file) for file in sorted(self.folder.glob("*.bin"))]
        records = np.concatenate(parts) if parts else np.empty(0, RECORD)

        # Sorted by epoch and index, for binary search.
        packed = _pack(records["epoch"], records["index"])
        self._packed, first = np.unique(packed, return_index=True)
        self._errors = np.stack([records["winner"][first], records["loser"][first]])
        self._pending: list[tuple[list[EpochIndex], Tensor]] = []

    def get(self, epoch_indices: list[EpochIndex]) -> Tensor:
        """The errors (2, B) of winner and loser, float32 on the CPU; NaN where they are unknown.

        Args:
            epoch_indices: of B pairs.
        """
        errors = torch.full((2, len(epoch_indices)), torch.nan)
        if not len(self._packed):
            return errors

        # Where each pair would stand among the known ones, and whether it does.
        epochs, indices = np.array(epoch_indices, dtype=np.int64).T
        wanted = _pack(epochs, indices)
        positions = np.searchsorted(self._packed, wanted).clip(max=len(self._packed) - 1)
        known = self._packed[positions] == wanted
        errors[:, torch.from_numpy(known)] = torch.from_numpy(self._errors[:, positions[known]])
        return errors

    def covers(self, epochs: np.ndarray, indices: np.ndarray) -> bool:
        """Whether the errors of all these pairs are known, so that a run needs no reference.

        Args:
            epochs: (n,) integers.
            indices: (n,) integers, of the examples.
        """
        return bool(np.isin(_pack(epochs, indices), self._packed).all())

    def add(self, epoch_indices: list[EpochIndex], errors: Tensor) -> None:
        """Keep the errors of pairs.

        They are written with those of the next `HELD_BACK` calls, or by `flush`: reading them waits
        for the device.

        Args:
            epoch_indices: of B pairs.
            errors: (2, B) of winner and loser, on any device.
        """
        self._pending.append((epoch_indices, errors.detach().float()))
        if len(self._pending) > HELD_BACK:
            self.flush()

    def flush(self) -> None:
        """Write what `add` holds back, without errors that are not finite."""
        if not self._pending:
            return
        epoch_indices: list[EpochIndex] = []
        for own_indices, _ in self._pending:
            epoch_indices += own_indices
        errors = torch.cat([own_errors for _, own_errors in self._pending], dim=1)
        self._pending = []

        # A record for each pair, with its checksum last.
        epochs, indices = np.array(epoch_indices).T
        winner, loser = errors.cpu().numpy()
        records = np.zeros(len(epoch_indices), RECORD)
        records["epoch"] = epochs
        records["index"] = indices
        records["winner"] = winner
        records["loser"] = loser
        records = records[np.isfinite(winner) & np.isfinite(loser)]
        records["crc"] = [_checksum(record) for record in records]

        # One call appends them all, so that a kill can cut the last record only.
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, records.tobytes())
        finally:
            os.close(descriptor)


def reference_key(
    reference: str,
    encodings: str,
    noising: str,
    seed: int,
    caption_dropout: float,
    flip: bool,
    precision: str,
) -> str:
    """A text that names all that the reference's errors depend on.

    Args:
        reference: digest of the reference's weights, which covers their precision.
        encodings: `encodings_key` of the data and the encoders.
        noising: key of the forward process.
        seed: with the next two, it fixes the random choices of every pair.
        caption_dropout: the share of examples whose caption is replaced by "".
        flip: whether images are mirrored at random.
        precision: of the computation.
    """
    return f"1/{reference}/{encodings}/{noising}/{seed}/{caption_dropout}/{flip}/{precision}"


def network_digest(network: nn.Module) -> str:
    """A digest of a network's weights, whatever folder or revision they are from.

    Of a network with adapters, the weights without them count.
    """
    weights = {}
    for name, tensor in network.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = tensor
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _pack(epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Epochs and indices as one integer each."""
    return (epochs.astype(np.int64) << 32) | indices.astype(np.int64)


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[: -RECORD["crc"].itemsize])


def _read_records(file: Path) -> np.ndarray:
    """The complete records of a file.

    Only the last one can be cut, since nothing is appended after a kill: a new process writes a
    file of its own.
    """
    data = file.read_bytes()
    length = len(data) // RECORD.itemsize * RECORD.itemsize
    records = np.frombuffer(data[:length], RECORD)
    if not len(records):
        return records
    return records[[_checksum(record) == record["crc"] for record in records]]
