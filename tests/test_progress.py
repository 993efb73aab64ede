"""Long work is never silent: a bar that nothing moves is written anew."""

import io
import time

from deradiff import progress
from deradiff.progress import LivingBar


def test_a_bar_that_nothing_moves_is_written_anew_with_what_is_being_done(monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.2)
    told = io.StringIO()
    bar = LivingBar(total=2, file=told, mininterval=0.2)
    bar.doing = "batch 3 of 8"
    time.sleep(1.0)
    lines = told.getvalue().split("\r")
    assert len([line for line in lines if "batch 3 of 8" in line]) >= 2
    bar.update()
    bar.close()
    ended = told.getvalue()
    time.sleep(0.5)
    assert told.getvalue() == ended
    assert "1/2" in ended


def test_a_bar_that_nobody_wants_to_see_has_no_thread(monkeypatch):
    monkeypatch.setattr(progress.threading, "Thread", None)
    bar = LivingBar(total=2, disable=True)
    bar.update()
    bar.close()


def test_a_bar_that_moves_is_not_written_by_the_thread(monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 30.0)
    told = io.StringIO()
    with LivingBar(total=3, file=told, mininterval=0) as bar:
        bar.doing = "never shown"
        for _ in range(3):
            bar.update()
    assert "never shown" not in told.getvalue()
