"""How commands are named: as they can be typed where deradiff is installed."""

from pathlib import Path

import pytest

from configs.entry import CONFIGS
from configs.keys import help_text
from deradiff import command_line
from deradiff.command_line import STAGES, command_of
from sample.config import SampleConfig


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The package as it lies in a wheel: with the stages inside."""
    (tmp_path / "commands").mkdir()
    monkeypatch.setattr(command_line, "PACKAGE", tmp_path)


def test_a_checkout_has_the_stages_as_packages():
    assert command_of("train") == "python -m train"
    assert command_of("calibrate") == "python -m deradiff calibrate"


@pytest.mark.parametrize("stage", STAGES)
def test_a_wheel_has_the_console_command_alone(wheel, stage):
    assert command_of(stage) == f"deradiff {stage}"


def test_the_help_of_a_wheel_names_that_command(wheel):
    page = help_text("sample", SampleConfig, Path(CONFIGS))
    assert page.startswith("deradiff sample key=value ...")
    assert "deradiff sample --multirun key=1,2" in page
