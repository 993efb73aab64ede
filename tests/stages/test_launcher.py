"""`--multirun`: a process group per value, on a toy stage; jobs side by side, failed, interrupted."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from hydra_plugins.deradiff_launcher._jobs import Job, run_jobs
from hydra_plugins.deradiff_launcher.process_group import ProcessGroupLauncher, _command


def test_hydra_finds_the_launcher_by_itself():
    assert "ProcessGroupLauncher" in {
        plugin.__name__ for plugin in Plugins.instance().discover(Launcher)
    }


def test_each_value_runs_in_a_process_of_its_own_and_a_failed_one_is_named_at_the_end(toy):
    done = toy(
        "--multirun", "data=fails-at-7", "dpo.beta=5,7,9", "model=small", "hydra.launcher.workers=2"
    )
    assert done.returncode == 2
    assert (
        done.err
        == "toy: 1 of 3 runs failed: dpo.beta=7 (toy: seven does not work: see runs/toy/beta7/launch.log)\n"
    )
    logs = {
        beta: (toy.folder / f"runs/toy/beta{beta}/launch.log").read_text() for beta in (5, 7, 9)
    }
    assert all(
        f"beta {beta} base org/small in runs/toy/beta{beta}\nthreads 1 " in log
        for beta, log in logs.items()
    )
    assert len({re.search(r"pid (\d+)", log)[1] for log in logs.values()}) == 3
    assert all(
        f"start dpo.beta={beta}, output in runs/toy/beta{beta}/launch.log\n" in done.out
        for beta in logs
    )
    assert {p.name for p in toy.folder.iterdir()} == {"toy", "conf", "runs"}, "no multirun folder"


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
    assert done.returncode == 2 and "start" not in done.out
    assert done.err.count("\n") == 1 and done.err.endswith(sentence + "\n"), done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_child(toy, number):
    sweep = toy.start("--multirun", "data=slow", "dpo.beta=5,6,7", "hydra.launcher.workers=2")
    children = _wait_for(
        lambda: found if len(found := sorted(toy.folder.glob("started-*"))) == 2 else None
    )
    sweep.send_signal(number)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130 and err == "toy: interrupted; the same command resumes\n"
    assert not [c for c in children if Path(f"/proc/{c.name.split('-')[2]}").exists()]
    assert len(list(toy.folder.glob("started-*"))) == 2, "nor does the third start"


def _wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def _python(name, code, folder):
    return Job(name, [sys.executable, "-c", code], folder / name)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_than_workers_run_at_once(tmp_path, workers):
    code = """if True:
        import pathlib, time
        folder, mine = pathlib.Path({0!r}), pathlib.Path({0!r}) / "on-{1}"
        others = len(list(folder.glob("on-*")))
        mine.touch()
        time.sleep(0.3)
        mine.unlink()
        (folder / "seen-{1}").write_text(str(others))"""
    jobs = [_python(f"j{i}", code.format(str(tmp_path), i), tmp_path) for i in range(4)]
    assert run_jobs(jobs, workers, one_thread=True) == []
    seen = [int((tmp_path / f"seen-{i}").read_text()) for i in range(4)]
    assert len(seen) == 4 and max(seen) <= workers - 1


def test_a_failure_is_told_by_its_last_line_and_does_not_stop_the_others(tmp_path, capfd):
    jobs = [
        _python("bad", "import sys; print('one'); sys.exit('out of luck')", tmp_path),
        _python("mute", "import sys; sys.exit(3)", tmp_path),
    ]
    jobs.append(_python("good", "print('fine')", tmp_path))
    failed = run_jobs(jobs, 3, one_thread=True)
    assert set(failed) == {
        f"bad (out of luck: see {tmp_path}/bad/launch.log)",
        f"mute (it wrote nothing: see {tmp_path}/mute/launch.log)",
    }
    assert (tmp_path / "good/launch.log").read_text() == "fine\n"
    assert run_jobs(jobs[1:], 1, one_thread=True) == ["mute (failed with status 3)"]
    assert "fine\n" in capfd.readouterr().out, "one at a time, a job writes to the terminal"


def test_gpus_get_an_accelerate_launch_over_all_of_them():
    assert _command("train", 0) == [sys.executable, "-m", "train"]
    launch = _command("train", 4)
    assert launch[1:3] == ["-m", "accelerate.commands.launch"] and launch[-2:] == ["-m", "train"]
    assert launch[launch.index("--num_processes") + 1] == "4"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
def test_a_stored_accelerate_config_decides_how_a_value_is_sharded(tmp_path, monkeypatch, kind):
    """What accelerate makes of our command, by its own parser: nothing is launched."""
    from accelerate.commands import launch as accelerate_launch

    file = tmp_path / "accelerate.yaml"
    file.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 8\n"
        "fsdp_config: {fsdp_version: 2}\ndeepspeed_config: {zero_stage: 2}\nmachine_rank: 0\nuse_cpu: false\n"
    )
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for command in (_command("train", 4), _command("train", 4, str(file))):
        assert ("--config_file" in command) == (command != _command("train", 4))
        args = accelerate_launch.launch_command_parser().parse_args(command[3:])
        args.config_file = str(file)
        args = accelerate_launch._validate_launch_command(args)[0]
        assert (args.use_fsdp, args.use_deepspeed, args.multi_gpu) == (
            kind == "FSDP",
            kind == "DEEPSPEED",
            kind == "MULTI_GPU",
        )
        assert args.num_processes == 4 and (kind != "FSDP" or args.fsdp_version == 2)


def test_an_accelerate_config_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match=r"config_file=nowhere\.yaml does not exist: type accelerate config"
    ):
        ProcessGroupLauncher(config_file="nowhere.yaml")


def test_workers_must_be_a_positive_number():
    with pytest.raises(ValueError, match="at least 1"):
        ProcessGroupLauncher(workers=0)
