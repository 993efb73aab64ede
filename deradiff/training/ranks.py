"""The ranks of a launch: they come together before any works, and none waits for one that is lost.

A rank that is lost sends no word. The cable was pulled, its machine stopped, or it was refused at
its start; the others wait for it in a collective, which no signal reaches. So every rank has a
thread that tells the others that it lives, and one that ends the process where another is silent.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from deradiff.terminal import say, warn
from deradiff.training.preemption import REQUEUE, SIGNALS, RanksLost

COLLECTIVE_PATIENCE = timedelta(hours=24)
"""Of a collective: ranks wait while one labels pairs or writes the last of a cache."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What the ranks talk through, by device. accelerate chooses for others."""

TIMEOUT = 600.0
"""Seconds after which a silent rank is given up where no key says it."""

HURRY = 30.0
"""Seconds of silence that are enough once a signal has asked for a stop."""

ENDING = 30.0
"""Seconds in which a rank may end by itself after another one has failed."""

REMINDER = 10.0
"""Seconds between two words of a rank that waits for others to come."""

POLL = 0.25
"""Seconds between two looks."""

STANDSTILL = 2.0
"""Seconds without a look after which this process itself has stood still."""

LOST_CONNECTION = ("gloo", "nccl", "connection", "socket", "timed out", "timeout")
"""What torch's words contain where a rank is gone in the middle of a collective."""


class Ranks:
    """The ranks of a launch, as one of them sees the others.

    Args:
        store: that all of them reach; None: there is one rank.
        rank: of this process.
        count: of all ranks.
        timeout: seconds after which a silent rank is given up.
    """

    def __init__(self, store: Store | None, rank: int, count: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.count = count
        self.timeout = timeout

    @property
    def others(self) -> list[int]:
        """The numbers of the other ranks."""
        return [rank for rank in range(self.count) if rank != self.rank]

    def host_of(self, rank: int) -> str:
        """The machine of a rank."""
        assert self.store is not None
        return self.store.get(f"host/{rank}").decode()


def gather_ranks(device: str, timeout: float) -> Ranks:
    """Wait until all ranks of the launch are there, and make one group of them.

    Args:
        device: type of the device that this rank computes on.
        timeout: seconds to wait, and after which a silent rank is given up.

    Raises:
        RanksLost: where one has not come.
        ValueError: where ranks compute on different kinds of devices.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    is_told = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if count == 1 or not is_told or device not in BACKENDS or dist.is_initialized():
        return Ranks(None, 0, 1, timeout)
    rank = int(os.environ["RANK"])
    launch_store = _open_store(rank, timeout)

    # Who is there, and with what?
    store = PrefixStore("deradiff", launch_store)
    store.set(f"host/{rank}", platform.node())
    store.set(f"device/{rank}", device)
    ranks = Ranks(store, rank, count, timeout)
    _wait_for_all(ranks, "device")
    devices = [store.get(f"device/{other}").decode() for other in range(count)]
    hosts = [ranks.host_of(other) for other in range(count)]

    # Rank 0 may be the store: it stays until all have read what it holds.
    store.set(f"read/{rank}", "")
    _wait_for_all(ranks, "read")
    for other, theirs in enumerate(devices):
        if theirs != device:
            raise ValueError(
                f"rank {other} ({hosts[other]}) computes on {theirs}, and rank {rank} "
                f"({hosts[rank]}) on {device}: mend the GPUs' driver, or give cpu=true to all"
            )
    dist.init_process_group(
        BACKENDS[device],
        store=PrefixStore("group", launch_store),
        rank=rank,
        world_size=count,
        timeout=COLLECTIVE_PATIENCE,
    )
    return ranks


def _open_store(rank: int, timeout: float) -> Store:
    """The store of the launch: torchrun's, or one that rank 0 holds.

    Raises:
        RanksLost: where it is not reached.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not is_torchruns,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise RanksLost(
            f"rank {rank} does not reach rank 0 at {address}:{port} ({_first_line(error)}): start "
            "all ranks again"
        ) from error
    # torchrun starts ranks again after a failure; what the last ones said is not theirs.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt/{attempt}", store)


def _wait_for_all(ranks: Ranks, word: str) -> None:
    """Wait until every rank has said a word. Raises RanksLost."""
    assert ranks.store is not None
    start = time.monotonic()
    told = start
    missing = ranks.others
    while missing:
        try:
            missing = [rank for rank in missing if not ranks.store.check([f"{word}/{rank}"])]
        except RuntimeError as error:
            raise RanksLost(f"rank 0 is gone ({_first_line(error)}): start all again") from error
        now = time.monotonic()
        names = ", ".join(map(str, missing))
        if missing and now - start > ranks.timeout:
            raise RanksLost(
                f"of {ranks.count} ranks, rank {names} did not come within {ranks.timeout:g} s: "
                "see what it said at its start, and start all ranks again (ranks_timeout=...)"
            )
        if missing and now - told > REMINDER:
            told = now
            say(f"rank {ranks.rank} of {ranks.count} waits for rank {names}")
        time.sleep(POLL)


class Watch:
    """A block in which a lost rank ends this process, whatever its main thread waits for.

    Args:
        ranks: of the launch.
        stage: of the command, for the sentence.
        kept: says what the command can go on from.
    """

    def __init__(self, ranks: Ranks, stage: str, kept: Callable[[], str]) -> None:
        self.ranks = ranks
        self.stage = stage
        self.kept = kept
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        # When each other rank was last heard, and what it said; the seconds are of this process.
        self._heard: dict[int, float] = {}
        self._words: dict[int, bytes] = {}
        # When a rank was first seen to have failed, and why.
        self._failed: dict[int, tuple[float, str]] = {}
        # Signals are written here even while the main thread waits.
        self._signals = -1
        self._signals_end = -1
        self._wakeup_before = -1
        self._is_hurried = False
        self._hosts: dict[int, str] = {}

    @property
    def period(self) -> float:
        """Seconds between two words of a rank."""
        return min(10.0, max(0.2, self.ranks.timeout / 20))

    def __enter__(self) -> Watch:
        """Begin to watch."""
        if self.ranks.store is None:
            return self
        self._listen()
        self._hosts = {rank: self.ranks.host_of(rank) for rank in self.ranks.others}
        now = time.monotonic()
        self._heard = dict.fromkeys(self.ranks.others, now)
        for work in (self._talk, self._judge):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the watch; others are told why this rank ends.

        Raises:
            RanksLost: where the block ended because another rank is gone.
        """
        if self.ranks.store is None:
            return
        why = ""
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            why = self._who_is_lost()
        self._over.set()
        if error is not None and not why:
            self._tell(f"{type(error).__name__}: {_first_line(error)}")
        self._stop_listening()
        if why:
            raise RanksLost(self._sentence(why))

    def _tell(self, why: str) -> None:
        """Tell the others that this rank has failed, if they can be reached."""
        assert self.ranks.store is not None
        # Where they cannot, they notice the silence.
        with suppress(RuntimeError):
            self.ranks.store.set(f"failed/{self.ranks.rank}", why)

    # Signals

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._signals, self._signals_end = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._signals_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._signals_end, warn_on_full_buffer=False)

    def _stop_listening(self) -> None:
        if self._signals < 0:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for thread in self._threads:
            thread.join(2 * POLL)
        os.close(self._signals)
        os.close(self._signals_end)
        self._signals = -1

    def _note_signals(self) -> None:
        """Whether a signal has asked for a stop."""
        if self._signals < 0:
            return
        try:
            numbers = os.read(self._signals, 64)
        except BlockingIOError:
            return
        self._is_hurried |= any(number in numbers for number in SIGNALS)

    # The threads

    def _talk(self) -> None:
        """Tell the others that this rank lives, and hear them; a lost connection blocks it."""
        # A connection of its own: the main thread may wait on the other one.
        launch_store: Any = self.ranks.store
        store = launch_store.clone()
        number = 0
        while not self._over.is_set():
            number += 1
            # Where the store is gone, nobody is heard any more.
            with suppress(RuntimeError):
                store.set(f"alive/{self.ranks.rank}", str(number))
                for rank in self.ranks.others:
                    self._hear(store, rank)
            self._over.wait(self.period)

    def _hear(self, store: Store, rank: int) -> None:
        """Note what a rank has said."""
        if store.check([f"failed/{rank}"]) and rank not in self._failed:
            why = store.get(f"failed/{rank}").decode(errors="replace")
            self._failed[rank] = (time.monotonic(), why)
        word = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
        if word != self._words.get(rank):
            self._words[rank] = word
            self._heard[rank] = time.monotonic()

    def _judge(self) -> None:
        """End the process where a rank is silent for too long, or has failed."""
        last = time.monotonic()
        while not self._over.wait(POLL):
            now = time.monotonic()
            if now - last > max(STANDSTILL, self.period):
                # This process itself stood still, as under SIGSTOP.
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            self._note_signals()
            why = self.lost(now)
            if why and not self._over.is_set():
                # The main thread may wait in a collective.
                warn(f"{self.stage}: {self._sentence(why)}")
                os._exit(REQUEUE)

    def lost(self, now: float) -> str:
        """Which rank is lost, and how; empty where none is.

        Args:
            now: by `time.monotonic`.
        """
        limit = min(self.ranks.timeout, HURRY) if self._is_hurried else self.ranks.timeout
        for rank, (since, why) in self._failed.items():
            if now - since > min(limit, ENDING):
                return f"{self._name(rank)} has ended ({why})"
        for rank, since in self._heard.items():
            if now - since > limit:
                return f"{self._name(rank)} has been silent for {now - since:.0f} s"
        return ""

    def _who_is_lost(self) -> str:
        """Who is gone, after a collective has failed: the words of the last seconds tell it."""
        silence = max(STANDSTILL, 2 * self.period)
        end = time.monotonic() + 2 * silence + self.period
        while time.monotonic() < end:
            now = time.monotonic()
            for rank, (_, why) in self._failed.items():
                return f"{self._name(rank)} has ended ({why})"
            for rank, since in self._heard.items():
                if now - since > silence:
                    return f"{self._name(rank)} has been silent for {now - since:.0f} s"
            time.sleep(POLL)
        return ""

    def _name(self, rank: int) -> str:
        host = self._hosts.get(rank, "")
        return f"rank {rank} ({host})" if host else f"rank {rank}"

    def _sentence(self, why: str) -> str:
        return f"{why}; {self.kept()}, and the same command resumes"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch's says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in LOST_CONNECTION)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
