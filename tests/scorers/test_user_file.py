"""A scorer of the user's own: one class in one file, checked without being run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from configs.entry import CONFIGS
from deradiff.scorers import check_scorer, check_spec, load_scorer, load_spec
from eval.__main__ import main as _registers_the_schema  # noqa: F401
from eval.config import EvalConfig
from tests.support.scorer_images import assert_refused

ROOT = Path(__file__).parents[2]

BRIGHT = '''
import numpy as np

class Brightness:
    """How bright an image is."""
    scale = "grey level, 0 to 255"
    preprocessing = "greyscale"

    def __call__(self, images, prompts):
        return [np.asarray(image.convert("L")).mean() for image in images]
'''

# A class that takes the device and gives its scores in the form that is filled in.
WITH_DEVICE = """
import dataclasses, numpy as np, torch
@dataclasses.dataclass
class Helper:
    name: str
class Mine:
    scale, preprocessing, version = "order", "none", "weights of May"
    def __init__(self, device):
        self.helper = Helper(device)
    def __call__(self, images, prompts):
        assert self.helper.name == "cpu" and not torch.is_grad_enabled()
        assert all(image.mode == "RGB" for image in images)
        return {scores}
"""

GREY_LEVELS = (0, 100, 255)
IMAGES = [Image.new("RGBA", (4, 3), (level, level, level, 255)) for level in GREY_LEVELS]


def write_file(folder: Path, text: str = BRIGHT, name: str = "my_scorer.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_one_class_in_one_file_is_a_scorer(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    check_scorer("mine", file=file)
    scorer = load_scorer("mine", file=file)

    scores = scorer(IMAGES, ["a"] * 3)
    assert scores.tolist() == [0, 100, 255]
    assert scores.dtype == torch.float32
    assert scorer([], []).shape == (0,)

    assert scorer.name == "mine"
    assert scorer.scale == "grey level, 0 to 255"
    assert scorer.preprocessing == "greyscale"


def test_its_version_is_that_of_the_file(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    changed = write_file(tmp_path, BRIGHT + "#", "b.py")
    version = load_scorer("mine", file=file).version
    assert load_scorer("other", file=file).version == version
    assert load_scorer("mine", file=changed).version != version


@pytest.mark.parametrize(
    "scores",
    ["torch.arange(len(images))", "np.arange(len(images), dtype=np.float64)", "(0, 1, 2)"],
)
def test_it_may_give_a_tensor_an_array_or_a_list_and_take_the_device(
    tmp_path: Path, scores: str
) -> None:
    file = write_file(tmp_path, WITH_DEVICE.format(scores=scores))
    scorer = load_scorer("mine", file=file, device="cpu")
    assert scorer(IMAGES, ["a", "b", "c"]).tolist() == [0, 1, 2]
    assert scorer.version.endswith("-weights of May")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold one class with a __call__.*holds none"),
        (BRIGHT + BRIGHT.replace("Brightness", "Darkness"), r"holds 2 \(Brightness, Darkness\)"),
        (
            BRIGHT.replace("scale =", "scal ="),
            "class Brightness in .* must state its scale: write scale = '...'",
        ),
        (BRIGHT.replace("preprocessing =", "prep ="), "must state its preprocessing"),
    ],
)
def test_what_is_no_scorer_is_refused_and_not_run(tmp_path: Path, text: str, words: str) -> None:
    trace = tmp_path / "trace"
    file = write_file(tmp_path, f"open({str(trace)!r}, 'w')\n" + text)
    assert_refused(words, "mine", file=file)
    assert not trace.exists()


@pytest.mark.parametrize("text", ["class (", "\0"])
def test_what_is_no_python_is_refused(tmp_path: Path, text: str) -> None:
    file = write_file(tmp_path, text)
    assert_refused("is no Python that can be read", "mine", file=file)


def test_the_check_does_not_run_the_file(tmp_path: Path) -> None:
    check_scorer("mine", file=write_file(tmp_path, BRIGHT + "raise SystemError\n"))


def test_a_file_that_is_missing_is_refused() -> None:
    assert_refused("there is no Python file none.py", "mine", file="none.py")
    assert_refused("there is no Python file org/name", "mine", file="org/name")
    assert_refused("your own by its file, file=<yours>.py", "mine")


def test_a_taken_name_and_a_checkpoint_are_refused(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    taken = "clip is a scorer of deradiff's: give the one in .* a name of its own"
    assert_refused(taken, "clip", file=file)
    loads_itself = "loads its weights itself: leave out checkpoint"
    assert_refused(loads_itself, "mine", file=file, checkpoint="x")


def test_scores_that_are_not_one_for_each_image_are_refused(tmp_path: Path) -> None:
    scorer = load_scorer("mine", file=write_file(tmp_path, BRIGHT.replace(".mean()", "")))
    words = r"Brightness gave scores of shape \[3, 3, 4\] for 3 images"
    with pytest.raises(ValueError, match=words):
        scorer(IMAGES, ["a"] * 3)


def test_it_is_named_on_the_command_line(tmp_path: Path) -> None:
    keys = [
        "samples=[a,b]",
        "tracking=none",
        "scorers=[clip,mine]",
        f"scorers.mine.file={write_file(tmp_path)}",
    ]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = OmegaConf.to_object(compose("eval", keys))
    assert isinstance(config, EvalConfig)
    assert list(config.scorers) == ["clip", "mine"]

    spec = config.scorers["mine"].spec("scorers.mine")
    check_spec(spec)
    assert np.isclose(load_spec(spec)(IMAGES[1:2], ["a"]).item(), 100)


def test_the_document_shows_a_scorer_that_works(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "scorers.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scorer = load_scorer("mine", file=write_file(tmp_path, code))
    assert scorer(IMAGES, ["a"] * 3).tolist() == [0, 100, 255]
