"""What a run is in W&B: its id, its tags, curves over an axis of their own, tables of numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import wandb_tracker
from configs.tracking import TrackingConfig, tracker
from configs.wandb_tracker import WandbTracker


class Run:
    """A run of W&B that keeps what it gets."""

    url = "https://wandb.test/run"
    offline = False
    dir = "wandb/offline-run-1/files"

    def __init__(self, **options):
        self.options = options
        self.id = options.get("id")
        self.logged = []
        self.axes = {}

    def log(self, values, step=None):
        self.logged.append(values)

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def finish(self, exit_code):
        pass


@pytest.fixture
def runs(monkeypatch):
    """The runs that were started."""
    started = []

    def init(**options):
        started.append(Run(**options))
        return started[-1]

    fake = SimpleNamespace(login=lambda **_: True, init=init, Settings=lambda **_: None)
    monkeypatch.setattr(wandb_tracker, "wandb", fake)
    return started


def start(run_dir, **settings):
    run_dir.mkdir(parents=True, exist_ok=True)
    with tracker(TrackingConfig(kind="wandb", **settings), "eval", run_dir, {}):
        pass


def test_a_directory_is_one_run_and_two_of_one_name_are_two(runs, tmp_path, capsys):
    start(tmp_path / "a/eval/mine")
    start(tmp_path / "a/eval/mine")
    start(tmp_path / "b/eval/mine")
    first, again, other = [run.id for run in runs]
    assert first == again != other
    assert first.startswith("eval-mine-") and other.startswith("eval-mine-")
    assert "eval: W&B: https://wandb.test/run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 300, "a b/c:d@e"])
def test_an_id_is_one_that_wandb_takes(runs, tmp_path, name):
    start(tmp_path / name[:200].replace("/", "_"))
    assert len(runs[0].id) <= 128 and not wandb_tracker.NOT_IN_NAMES.search(runs[0].id)


def test_tags_and_what_to_type_where_it_is_offline(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "offline", True)
    monkeypatch.setattr(Run, "url", None)
    start(tmp_path, tags=["paper"])
    assert runs[0].options["tags"] == ["eval", "paper"]
    expected = f"wandb sync {Path('wandb/offline-run-1')} uploads it"
    assert expected in capsys.readouterr().out


def test_a_curve_has_its_own_axis_and_one_log_call_a_point():
    run = Run()
    track = WandbTracker(run)
    points = [{"lam": 0.0, "score/vivid/a": 1.0}, {"lam": 0.5, "score/vivid/a": 2.0}]
    for point in points:
        track.curve("lam", point)
    assert run.logged == points and run.axes == {"score/vivid/a": "lam"}


def test_a_table_holds_numbers_texts_and_what_is_not_there():
    run = Run()
    WandbTracker(run).table("means", ["lam", "beta", "name"], [[0.5, None, "a"], [1.0, 2.0, "b"]])
    (values,) = run.logged
    assert values["means"].data == [[0.5, None, "a"], [1.0, 2.0, "b"]]
