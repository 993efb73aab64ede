"""Two machines on one: network namespaces that are joined by a cable, which can be pulled."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
SIDES = ("a", "b")
ADDRESS = "10.203.1.{}"
PORT = 29517
SECONDS = 240
"""After which a node that has not ended hangs."""


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two network namespaces need root and iproute2"
    tried = subprocess.run(
        ["ip", "netns", "add", "deradiff-try"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    _ip("netns", "del", "deradiff-try")
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Nodes:
    """Two nodes with a rank each.

    Args:
        folders: where each node's command runs; the same one twice is a shared disk.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = dict(zip(SIDES, folders))
        self.logs: dict[str, Path] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *commands: Sequence[str]) -> None:
        """Start torchrun in both nodes.

        Args:
            commands: what follows `-m`, of node a and of node b; one for both.
        """
        for rank, side in enumerate(SIDES):
            words = commands[rank % len(commands)]
            folder = self.folders[side]
            folder.mkdir(parents=True, exist_ok=True)
            self.logs[side] = folder / f"node-{side}.log"
            environment = os.environ | {
                "GLOO_SOCKET_IFNAME": f"deradiff-{side}",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            launcher += ["--nproc-per-node", "1", "--node-rank", str(rank)]
            launcher += ["--master-addr", ADDRESS.format(1), "--master-port", str(PORT)]
            with open(self.logs[side], "wb") as log:
                self.processes[side] = subprocess.Popen(
                    ["ip", "netns", "exec", f"deradiff-{side}", *launcher, "-m", *words],
                    cwd=folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def said(self, side: str) -> str:
        """What a node has written, a line each, without what a progress bar wrote over."""
        return self.logs[side].read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, side: str, pattern: str) -> None:
        """Wait until a node has said something. Raises TimeoutError."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if re.search(pattern, self.said(side)):
                return
            time.sleep(0.2)
        raise TimeoutError(f"node {side} never said {pattern}:\n{self.said(side)[-2000:]}")

    def end(self) -> dict[str, float]:
        """Wait until both nodes have ended; returns the seconds of each. Raises TimeoutError."""
        start = time.monotonic()
        seconds: dict[str, float] = {}
        while len(seconds) < len(SIDES) and time.monotonic() < start + SECONDS:
            for side, process in self.processes.items():
                if side not in seconds and process.poll() is not None:
                    seconds[side] = time.monotonic() - start
            time.sleep(0.2)
        hung = sorted(set(SIDES) - seconds.keys())
        self.kill()
        if hung:
            raise TimeoutError(f"node {hung} hangs:\n{self.said(hung[0])[-2000:]}")
        return seconds

    def kill(self) -> None:
        """End whatever still runs; torchrun's workers are in sessions of their own."""
        for side, process in self.processes.items():
            for pid in self._pids(side):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def _pids(self, side: str) -> list[int]:
        """The processes of a node."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"deradiff-{side}"], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def signal_worker(self, side: str, number: int) -> None:
        """Send a signal to the process that trains on a node, not to its launcher."""
        for pid in self._pids(side):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"-u" in words:
                os.kill(pid, number)


def pull() -> None:
    """Pull the cable: nothing arrives any more, and no connection is told so."""
    _ip("-n", "deradiff-a", "link", "set", "deradiff-a", "down")


@contextmanager
def joined() -> Iterator[None]:
    """Two namespaces with a cable between them, for the length of a block."""
    for side in SIDES:
        subprocess.run(["ip", "netns", "del", f"deradiff-{side}"], capture_output=True, check=False)
    for side in SIDES:
        _ip("netns", "add", f"deradiff-{side}")
    _ip("link", "add", "deradiff-a", "type", "veth", "peer", "name", "deradiff-b")
    try:
        for number, side in enumerate(SIDES, start=1):
            name = f"deradiff-{side}"
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for side in SIDES:
            _ip("netns", "del", f"deradiff-{side}")
