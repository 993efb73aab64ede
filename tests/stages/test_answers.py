"""What a command line is answered with where Hydra would print its own usage or grammar."""

from pathlib import Path

import pytest

from configs.answers import Command, check_arguments
from configs.entry import CONFIGS
from configs.keys import groups_of, help_text, keys_of, suggestion
from eval.config import EvalConfig
from sample.config import SampleConfig
from train.config import TrainConfig

SCHEMAS = {"train": TrainConfig, "sample": SampleConfig, "eval": EvalConfig}


def command(line):
    """A command line as a shell gives it, words between spaces."""
    stage, *arguments = line.split(" ")
    return Command(stage, SCHEMAS[stage], Path(CONFIGS), arguments)


ANSWERS = {
    "sample --anchor x": "without dashes: type anchor=x",
    "sample --anchor=x lambdas=[0]": "without dashes: type anchor=x",
    "train --beta 500": "without dashes: type dpo.beta=500",
    "train --beta=500": "without dashes: type dpo.beta=500",
    "train -m dpo.beta=1,2 --lr 1e-4": "without dashes: type optim.lr=1e-4",
    "train --max-train-steps 9": "without dashes: type steps=9",
    "train --gradient_accumulation_steps 4": "give optim.pairs_per_step, from which accumulation",
    "train --foo": "there is no setting foo; python -m train --help lists all",
    "sample anchor=x --lambdas 0.5": "type 'lambdas=[0.5]'",
    "sample anchor=x --lam -1": "type 'lambdas=[-1]'",
    "sample anchor=[a, b] mode=exact": "the shell took anchor=[a, b] apart at a space: "
    "type 'anchor=[a, b]'",
    "sample anchor x": "settings are written key=value: type anchor=x",
    "sample anchor = x": "settings are written key=value: type anchor=x",
    "sample anchor =x": "settings are written key=value: type anchor=x",
    "train sdxl": "sdxl alone says nothing: type model=sdxl",
    "eval runs/sample/a": "type 'samples=[runs/sample/a]'",
    "sample runs/train/a": "type anchor=runs/train/a",
    "train what": "cannot read what: write key=value",
    "train steps=3 =3": "without spaces around =",
}


@pytest.mark.parametrize("line", ANSWERS)
def test_what_is_no_setting_is_answered_with_one(line):
    with pytest.raises(ValueError) as error:
        check_arguments(command(line))
    answer = str(error.value)
    assert ANSWERS[line] in answer
    assert "\n" not in answer


@pytest.mark.parametrize(
    "line",
    [
        "train",
        "train --multirun dpo.beta=1,2",
        "train --cfg job --resolve -cd there dpo.beta=3 ~experiment ++tracking.kind=none",
        "train data.scorer={vivid:1,crisp:1}",
        "sample prompts=['(','a'] anchor=x",
        "sample anchor=[a",
    ],
)
def test_what_hydra_reads_is_left_to_it(line):
    check_arguments(command(line))


@pytest.mark.parametrize(
    ("stage", "name", "meant"),
    [
        ("sample", "lam", "lambdas"),
        ("sample", "lambda", "lambdas"),
        ("sample", "guidance", "guidance_scale"),
        ("sample", "num_inference_steps", "steps"),
        ("train", "beta", "dpo.beta"),
        ("train", "lora.rank", "finetune.rank"),
        ("train", "modle", "model"),
        ("train", "batch_size", "optim.batch_size"),
        ("sample", "optim", ""),
        ("train", "foo", ""),
    ],
)
def test_a_key_is_known_by_a_slip_its_end_or_its_beginning(stage, name, meant):
    groups = groups_of(Path(CONFIGS), stage)
    assert suggestion(name, SCHEMAS[stage], groups) == meant


@pytest.mark.parametrize("stage", SCHEMAS)
def test_help_shows_first_what_one_changes_most_and_defaults_last(stage):
    schema = SCHEMAS[stage]
    text = help_text(stage, schema, Path(CONFIGS))
    names = [key.name for key in keys_of(schema)]
    heads = [line.split()[0] for line in text.splitlines() if line[2:3].strip()]
    shown = [head for head in heads if head in names and head not in ("scorers",)]
    assert tuple(shown[: len(schema.USUAL)]) == schema.USUAL
    assert sorted(shown) == sorted(set(names) - {"scorers"})
    assert max(map(len, text.splitlines())) <= 100
    assert f"{schema.USUAL[0]}=" not in text


def test_help_of_training_begins_with_the_model_and_the_data():
    text = help_text("train", TrainConfig, Path(CONFIGS))
    groups = list(groups_of(Path(CONFIGS), "train"))
    assert groups == ["model", "data", "finetune", "experiment", "optim", "tracking"]
    assert "optimiser steps (default: 2000)" in text
    assert "tiny | z_image (default: shapes)" in text
