"""`--multirun`: a process group for each value, on a toy stage; and the jobs behind it."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands import launch as accelerate_launch
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from configs.entry import MISTAKE_STATUS
from hydra_plugins.deradiff_launcher import _jobs
from hydra_plugins.deradiff_launcher._commands import stage_command
from hydra_plugins.deradiff_launcher._jobs import Job, run_jobs
from hydra_plugins.deradiff_launcher.process_group import ProcessGroupLauncher


def test_hydra_finds_the_launcher_by_itself():
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Launcher)]
    assert "ProcessGroupLauncher" in names


# Sweeps of the toy stage


def test_each_value_runs_in_a_process_of_its_own_and_a_failed_one_is_named_at_the_end(toy):
    overrides = ("data=fails-at-7", "dpo.beta=5,7,9", "model=small", "hydra.launcher.workers=2")
    done = toy("--multirun", *overrides)
    assert done.returncode == MISTAKE_STATUS
    reason = "toy: seven does not work: see runs/toy/beta7/launch.log"
    assert done.err == f"toy: 1 of 3 runs failed: dpo.beta=7 ({reason})\n"

    processes = set()
    for beta in (5, 7, 9):
        log = (toy.folder / f"runs/toy/beta{beta}/launch.log").read_text()
        assert f"beta {beta} base org/small in runs/toy/beta{beta}\nthreads 1 " in log
        assert f"start dpo.beta={beta}, output in runs/toy/beta{beta}/launch.log\n" in done.out
        processes.add(re.search(r"pid (\d+)", log)[1])
    assert len(processes) == 3
    files = {path.name for path in toy.folder.iterdir()}
    assert files == {"toy", "conf", "runs"}, "no multirun folder"


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (("data=x", "dpo.beta=5,-1"), {}, "dpo.beta must be above 0, not -1.0"),
        (
            ("data=x", "dpo.beta=5,6", "name=z"),
            {},
            "and dpo.beta=6 would both write to runs/toy/z: put what varies into name=...",
        ),
        (
            ("data=x", "dpo.beta=5,6", "hydra.launcher.workers=0"),
            {},
            "hydra.launcher.workers must be at least 1, not 0",
        ),
        (
            ("data=x", "dpo.beta=5,6"),
            {"RANK": "1"},
            "type python -m toy --multirun data=x dpo.beta=5,6",
        ),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_its_first_value_starts(
    toy, arguments, environment, sentence
):
    done = toy("--multirun", *arguments, **environment)
    assert done.returncode == MISTAKE_STATUS
    assert "start" not in done.out
    assert done.err.count("\n") == 1
    assert done.err.endswith(sentence + "\n")


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_ends_every_child(toy, signal_number):
    def started():
        return list(toy.folder.glob("started-*"))

    sweep = toy.start("--multirun", "data=slow", "dpo.beta=5,6,7", "hydra.launcher.workers=2")
    wait_for(lambda: len(started()) == 2)
    sweep.send_signal(signal_number)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130
    assert err == "toy: interrupted; the same command resumes\n"
    assert len(started()) == 2, "nor does the third start"
    for file in started():
        process = file.name.split("-")[2]
        assert not Path(f"/proc/{process}").exists()


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Jobs


def python_job(name, code, folder):
    return Job(name, [sys.executable, "-c", code], folder / name)


COUNTS_OTHERS = """
import pathlib, sys, time

folder = pathlib.Path({folder!r})
others = len(list(folder.glob("on-*")))
mine = folder / "on-{name}"
mine.touch()
time.sleep(0.3)
mine.unlink()
(folder / "others-{name}").write_text(str(others))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_than_workers_run_at_once(tmp_path, workers):
    jobs = []
    for number in range(4):
        code = COUNTS_OTHERS.format(folder=str(tmp_path), name=number)
        jobs.append(python_job(f"job{number}", code, tmp_path))
    assert run_jobs(jobs, workers, one_thread=True) == []
    others = [int((tmp_path / f"others-{number}").read_text()) for number in range(4)]
    assert max(others) <= workers - 1


def test_a_failure_is_told_by_its_last_line_and_does_not_stop_the_others(tmp_path, capfd):
    jobs = [
        python_job("bad", "import sys; print('one'); sys.exit('out of luck')", tmp_path),
        python_job("mute", "import sys; sys.exit(3)", tmp_path),
        python_job("good", "print('fine')", tmp_path),
    ]
    failures = run_jobs(jobs, 3, one_thread=True)
    assert sorted(failures) == [
        f"bad (out of luck: see {tmp_path}/bad/launch.log)",
        f"mute (it wrote nothing: see {tmp_path}/mute/launch.log)",
    ]
    assert (tmp_path / "good/launch.log").read_text() == "fine\n"
    assert re.search(r"^good: done after \d+ s; fine$", capfd.readouterr().out, re.MULTILINE)

    # One at a time, a job writes to the terminal
    assert run_jobs(jobs[1:], 1, one_thread=True) == ["mute (failed with status 3)"]
    assert "fine\n" in capfd.readouterr().out


def test_what_runs_is_told_by_the_last_line_of_its_log(tmp_path, capfd, monkeypatch):
    """Once for each line that is new, a progress bar's too."""
    monkeypatch.setattr(_jobs, "PROGRESS_SECONDS", 0.1)
    code = "import time; print('loading\\n 10%\\r 50%', end='', flush=True); time.sleep(2)"
    assert run_jobs([python_job(name, code, tmp_path) for name in "ab"], 2, one_thread=True) == []
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines[:2]) == [f"start {n}, output in {tmp_path}/{n}/launch.log" for n in "ab"]
    assert sorted(lines[2:4]) == ["a: 50%", "b: 50%"]
    assert len(lines) == 6


# The command of a value


def test_gpus_get_an_accelerate_launch_over_all_of_them():
    assert stage_command("train", 0) == [sys.executable, "-m", "train"]
    command = stage_command("train", 4)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[-2:] == ["-m", "train"]
    assert command[command.index("--num_processes") + 1] == "4"


ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: bf16
num_machines: 1
num_processes: 8
fsdp_config: {{fsdp_version: 2}}
deepspeed_config: {{zero_stage: 2}}
machine_rank: 0
use_cpu: false
"""


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
@pytest.mark.parametrize("is_named", [False, True])
def test_an_accelerate_config_decides_how_a_value_is_sharded(tmp_path, monkeypatch, kind, is_named):
    """What accelerate makes of our command, by its own parser: nothing is launched."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(ACCELERATE_CONFIG.format(kind=kind))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    command = stage_command("train", 4, str(file) if is_named else None)
    assert ("--config_file" in command) == is_named

    arguments = accelerate_launch.launch_command_parser().parse_args(command[3:])
    arguments.config_file = str(file)
    arguments = accelerate_launch._validate_launch_command(arguments)[0]
    assert arguments.use_fsdp == (kind == "FSDP")
    assert arguments.use_deepspeed == (kind == "DEEPSPEED")
    assert arguments.multi_gpu == (kind == "MULTI_GPU")
    assert arguments.num_processes == 4
    if kind == "FSDP":
        assert arguments.fsdp_version == 2


# Settings


def test_an_accelerate_config_that_does_not_exist_is_refused():
    message = r"config_file=nowhere\.yaml does not exist: type accelerate config"
    with pytest.raises(ValueError, match=message):
        ProcessGroupLauncher(config_file="nowhere.yaml")


def test_workers_must_be_a_positive_number():
    with pytest.raises(ValueError, match="at least 1"):
        ProcessGroupLauncher(workers=0)
