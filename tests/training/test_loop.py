"""The loop: order, resume, accumulation, averages, bad numbers, signals, panels."""

import json
import math
import multiprocessing
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from deradiff.training.checkpoints import Checkpoints
from deradiff.training.loop import train
from deradiff.training.preemption import Preempted
from tests.support.regression import Regression, examples, options, weights


def train_here(objective, run_dir, rows=10, **changes):
    """Train on one CPU process."""
    return train(objective, examples(rows), options(**changes), run_dir, Accelerator(cpu=True))


def logged(run_dir):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_resumes_to_identical_weights(tmp_path, ema):
    whole = Regression()
    train_here(whole, tmp_path / "whole", ema=ema)
    with pytest.raises(KeyboardInterrupt):
        train_here(Regression(stop_at=30), tmp_path / "killed", ema=ema)

    resumed = Regression()
    with torch.no_grad():
        resumed.network.weight.fill_(7.0)  # whatever it starts from, the checkpoint decides
    progress = train_here(resumed, tmp_path / "killed", ema=ema)

    assert progress.step == 12
    assert len(resumed.seen) == 7 * 4
    assert torch.equal(weights(whole), weights(resumed))
    of_whole = logged(tmp_path / "whole")
    of_killed = logged(tmp_path / "killed")
    assert [row["step"] for row in of_killed] == [2, 4, 6, 8, 10, 12]
    assert [row["lr"] for row in of_whole] == [row["lr"] for row in of_killed]
    assert all(row["twice"] == 2 for row in of_whole)


def test_accumulation_is_one_larger_batch(tmp_path):
    large = Regression()
    small = Regression()
    train_here(large, tmp_path / "a", batch_size=4)
    train_here(small, tmp_path / "b", batch_size=2)
    assert large.seen == small.seen
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_left_in_the_network(tmp_path):
    plain = Regression()
    averaged = Regression()
    train_here(plain, tmp_path / "a")
    train_here(averaged, tmp_path / "b", ema=0.99)
    assert not torch.equal(weights(plain), weights(averaged))

    # The same trajectory, stopped after each step, averaged by hand.
    by_hand = weights(Regression())
    for step in range(1, 13):
        stopped = Regression()
        train_here(stopped, tmp_path / f"c{step}", steps=step)
        keep = min(0.99, (1 + step) / (10 + step))
        by_hand = torch.lerp(by_hand, weights(stopped), 1 - keep)
    torch.testing.assert_close(weights(averaged), by_hand, rtol=1e-4, atol=1e-5)


class PerExample(Regression):
    """The same with a loss, an index and a time for each example, as the diffusion objectives."""

    def __init__(self, broken=None):
        super().__init__()
        self.broken = broken

    def collate(self, items):
        time = torch.tensor([(item.index + 0.5) / 10 for item in items])
        return super().collate(items) | {"time": time}

    def loss(self, network, batch):
        rows = (network(batch["x"]) - batch["y"]).square().mean(1)
        if self.broken is not None:
            rows = torch.where(batch["index"] == self.broken, math.inf, 1.0) * rows
        return rows.mean(), {"loss": rows, "implicit_accuracy": (batch["index"] < 5).float()}


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path):
    class Broken(Regression):
        def loss(self, network, batch):
            loss, terms = super().loss(network, batch)
            if len(self.seen) > 24:
                return (network(batch["x"]) * 0).sqrt().mean(), terms
            return loss.square().sqrt(), terms

    message = r"step 6: the gradient is not finite; .*step-000005 holds the last good weights"
    with pytest.raises(FloatingPointError, match=message):
        train_here(Broken(), tmp_path)


def test_a_loss_that_is_not_finite_is_traced_to_its_pair_and_time(tmp_path):
    message = r"step \d: the loss is not finite, from pair 7 at t 750 .*no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        train_here(PerExample(broken=7), tmp_path)


def test_accuracy_is_averaged_by_band_of_time_and_terms_are_means_over_pairs(tmp_path):
    train_here(PerExample(), tmp_path, rows=20, steps=5, log_every=5)  # one epoch: 20 indices
    (row,) = logged(tmp_path)
    assert row["implicit_accuracy"] == 0.25
    bands = [row[f"implicit_accuracy/t{a}-{a + 250}"] for a in (0, 250, 500, 750)]
    # The time is (index + .5) / 10, held at 1: indices 0 to 2, 3 and 4, 5 to 7, and the rest.
    assert bands == pytest.approx([1.0, 1.0, 0.0, 0.0])
    assert row["memory_gb"] > 0
    assert row["pairs_per_second"] > 0
    assert "mfu" not in row


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_checkpoints_and_stops_between_two_steps(tmp_path, signal_number):
    class Signalled(Regression):
        def loss(self, network, batch):
            if len(self.seen) == 28:
                os.kill(os.getpid(), signal_number)
            return super().loss(network, batch)

    handler = signal.getsignal(signal_number)
    with pytest.raises(Preempted, match="at step 8; checkpoint written, the same command resumes"):
        train_here(Signalled(), tmp_path / "stopped")
    assert signal.getsignal(signal_number) == handler
    assert Checkpoints(tmp_path / "stopped", 2).newest().name == "step-000008"

    resumed = Regression()
    whole = Regression()
    train_here(resumed, tmp_path / "stopped")
    train_here(whole, tmp_path / "whole")
    assert torch.equal(weights(whole), weights(resumed))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, capfd):
    class Signalled(Regression):
        def loss(self, network, batch):
            if len(self.seen) in (24, 26):
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(network, batch)

    with pytest.raises(KeyboardInterrupt):
        train_here(Signalled(), tmp_path, batch_size=2)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert Checkpoints(tmp_path, 2).newest().name == "step-000005"


def test_workers_that_load_data_leave_signals_to_the_loop(tmp_path):
    class Signalled(Regression):
        def loss(self, network, batch):
            if len(self.seen) == 24:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGINT)
                    os.kill(child.pid, signal.SIGTERM)
            return super().loss(network, batch)

    objective = Signalled()
    train_here(objective, tmp_path, workers=1)
    assert len(objective.seen) == 48


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_data_raises_keeps_its_sentence(tmp_path, workers):
    class Damaged(Regression):
        def collate(self, items):
            raise ValueError("row 3 is not what was written: the same command goes on")

    with pytest.raises(ValueError, match=r"^row 3 is not what was written: the same command"):
        train_here(Damaged(), tmp_path, workers=workers)


def test_a_worker_that_is_killed_is_answered(tmp_path):
    class Killed(Regression):
        def collate(self, items):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match="mostly for want of memory: start fewer workers"):
        train_here(Killed(), tmp_path, workers=1)


def test_a_torn_line_of_the_metrics_costs_no_other(tmp_path):
    train_here(Regression(), tmp_path, steps=10)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1][:9] + b"\xff"
    lines.insert(3, b"[7]")
    lines.insert(3, b"{}")
    file.write_bytes(b"\n".join(lines) + b'{"step')
    train_here(Regression(), tmp_path)
    assert [row["step"] for row in logged(tmp_path)] == [2, 6, 8, 10, 12]


def test_what_a_kill_behind_a_checkpoint_left_out_is_shown_when_the_run_goes_on(tmp_path):
    shown = []

    def show(network, step):
        shown.append((step, weights_of(network)))
        if len(shown) == 2:
            raise KeyboardInterrupt

    wanted = options(show_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(Regression(), examples(), wanted, tmp_path, Accelerator(cpu=True), show=show)
    train(Regression(), examples(), wanted, tmp_path, Accelerator(cpu=True), show=show)
    assert [step for step, _ in shown] == [5, 10, 10]
    assert torch.equal(shown[1][1], shown[2][1])


def weights_of(network):
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


def test_a_call_of_show_does_not_disturb_what_is_trained(tmp_path):
    class Dropout(Regression):
        def loss(self, network, batch):
            batch["x"] = torch.nn.functional.dropout(batch["x"], 0.2)
            return super().loss(network, batch)

    steps = []

    def show(network, step):
        torch.rand(3)
        steps.append(step)

    results = []
    for every in (0, 3):
        objective = Dropout()
        run_dir = tmp_path / str(every)
        accelerator = Accelerator(cpu=True)
        train(objective, examples(), options(show_every=every), run_dir, accelerator, show=show)
        results.append(weights(objective))
    assert steps == [3, 6, 9, 12]
    assert torch.equal(*results)
