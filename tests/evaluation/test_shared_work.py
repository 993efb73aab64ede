"""Processes that share the work of a command all see the folder that they fill."""

from types import SimpleNamespace

import pytest

from deradiff.evaluation import shared_work
from deradiff.evaluation.shared_work import check_shared_disk


def processes(monkeypatch, others):
    """This process is the main one of several; `others` say whether they see its file."""
    monkeypatch.setattr(shared_work, "broadcast_object_list", lambda names: names)
    monkeypatch.setattr(shared_work, "gather_object", lambda own: [*own, *others])
    count = 1 + len(others)
    return SimpleNamespace(
        num_processes=count, is_main_process=True, wait_for_everyone=lambda: None
    )


def test_a_folder_of_one_machine_is_refused_before_work(monkeypatch, tmp_path):
    folder = tmp_path / "runs" / "mine"
    check_shared_disk(folder, processes(monkeypatch, [True, True]))
    assert folder.is_dir()
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match=r"process 2 of 3 does not see .*mine.* give runs=<"):
        check_shared_disk(folder, processes(monkeypatch, [True, False]))
    assert not list(folder.iterdir())


def test_a_process_that_does_not_see_the_main_ones_file_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_work, "SHOWS_WITHIN", 0.2)
    state = processes(monkeypatch, [])
    state.num_processes = 2
    state.is_main_process = False
    # What the main process broadcasts is a name that is not there.
    monkeypatch.setattr(shared_work, "broadcast_object_list", lambda names: ["elsewhere"])
    monkeypatch.setattr(shared_work, "gather_object", lambda own: [True, *own])
    with pytest.raises(ValueError, match="process 1 of 2 does not see"):
        check_shared_disk(tmp_path, state)


def test_one_process_is_asked_nothing(tmp_path):
    check_shared_disk(tmp_path / "new", SimpleNamespace(num_processes=1))
    assert not (tmp_path / "new").exists()
