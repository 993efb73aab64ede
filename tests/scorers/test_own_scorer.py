"""A scorer of the user's own: one class in one file, checked without being run, named on the
command line."""

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

BRIGHT = '''
import numpy as np

class Brightness:
    """How bright a picture is."""
    scale = "grey level, 0 to 255"
    preprocessing = "greyscale"

    def __call__(self, images, prompts):
        return [np.asarray(image.convert("L")).mean() for image in images]
'''
IMAGES = [Image.new("RGBA", (4, 3), (level, level, level, 255)) for level in (0, 100, 255)]


def written(folder: Path, text: str = BRIGHT, name: str = "my_scorer.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_one_class_in_one_file_is_a_scorer(tmp_path: Path) -> None:
    file = written(tmp_path)
    check_scorer("mine", file=file)
    scorer = load_scorer("mine", file=file)
    scores = scorer(IMAGES, ["a"] * 3)
    assert (
        scores.tolist() == [0, 100, 255]
        and scores.dtype == torch.float32
        and scorer([], []).shape == (0,)
    )
    assert (scorer.name, scorer.scale, scorer.preprocessing) == (
        "mine",
        "grey level, 0 to 255",
        "greyscale",
    )
    assert load_scorer("other", file=file).version == scorer.version
    assert (
        load_scorer("mine", file=written(tmp_path, BRIGHT + "#", "b.py")).version != scorer.version
    )


@pytest.mark.parametrize(
    "given", ["torch.arange(len(images))", "np.arange(len(images), dtype=np.float64)", "(0, 1, 2)"]
)
def test_it_may_give_a_tensor_an_array_or_a_list_and_take_the_device(
    tmp_path: Path, given: str
) -> None:
    text = f"""
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
        return {given}
"""
    scorer = load_scorer("mine", file=written(tmp_path, text), device="cpu")
    assert scorer(IMAGES, ["a", "b", "c"]).tolist() == [0, 1, 2] and scorer.version.endswith(
        "-weights of May"
    )


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
        ("class (", "is no Python that can be read"),
        ("\0", "is no Python that can be read"),
    ],
)
def test_what_is_no_scorer_is_refused_and_not_run(tmp_path: Path, text: str, words: str) -> None:
    run = tmp_path / "ran"
    file = written(
        tmp_path, text if "(" in text[:8] or "\0" in text else f"open({str(run)!r}, 'w')\n" + text
    )
    for call in (check_scorer, load_scorer):
        with pytest.raises(ValueError, match=words) as error:
            call("mine", file=file)
        assert "\n" not in str(error.value) and not run.exists()


def test_the_check_does_not_run_the_file(tmp_path: Path) -> None:
    check_scorer("mine", file=written(tmp_path, BRIGHT + "raise SystemError\n"))


def test_other_mistakes(tmp_path: Path) -> None:
    file = written(tmp_path)
    for words, name, given in (
        ("there is no Python file none.py", "mine", {"file": "none.py"}),
        ("there is no Python file org/name", "mine", {"file": "org/name"}),
        (
            "clip is a scorer of deradiff's: give the one in .* a name of its own",
            "clip",
            {"file": file},
        ),
        (
            "loads its weights itself: leave out checkpoint",
            "mine",
            {"file": file, "checkpoint": "x"},
        ),
        ("your own by its file, file=<yours>.py", "mine", {}),
    ):
        for call in (check_scorer, load_scorer):
            with pytest.raises(ValueError, match=words):
                call(name, **given)
    many = load_scorer("mine", file=written(tmp_path, BRIGHT.replace(".mean()", "")))
    with pytest.raises(
        ValueError, match=r"Brightness gave scores of shape \[3, 3, 4\] for 3 images"
    ):
        many(IMAGES, ["a"] * 3)


def test_it_is_named_on_the_command_line(tmp_path: Path) -> None:
    file = written(tmp_path)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        typed = [
            "samples=[a,b]",
            "tracking=none",
            "scorers=[clip,mine]",
            f"scorers.mine.file={file}",
        ]
        config = OmegaConf.to_object(compose("eval", typed))
    assert isinstance(config, EvalConfig) and list(config.scorers) == ["clip", "mine"]
    spec = config.scorers["mine"].spec()
    check_spec(spec)
    assert np.isclose(load_spec(spec)(IMAGES[1:2], ["a"]).item(), 100)


def test_the_document_shows_a_scorer_that_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert load_scorer("mine", file=written(tmp_path, code))(IMAGES, ["a"] * 3).tolist() == [
        0,
        100,
        255,
    ]
