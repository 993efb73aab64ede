"""A stage's command line, as a user meets it.

What is wrong is said in one sentence, with exit status 2 and no traceback.
"""

import pytest

from configs.entry import MISTAKE_STATUS


def test_a_good_command_runs_in_the_folder_that_the_config_names(toy):
    process = toy.start("data=x", "dpo.beta=500", "model=small")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert err == ""
    assert "beta 500 base org/small in runs/toy/beta500" in out
    files = {path.name for path in toy.folder.iterdir()}
    assert files == {"toy", "conf"}, "Hydra leaves no log, outputs or .hydra folder"


NOT_A_FLOAT = "Value '{}' of type 'str' could not be converted to Float ({})"

MISTAKES = {
    ("data=x", "dpo.bta=3"): "there is no setting dpo.bta; did you mean dpo.beta=3?",
    ("data=x", "+extra=3"): "there is no setting extra; python -m toy --help lists all",
    ("data=x", "lambdas=0.5"): "lambdas is a list: give 'lambdas=[0.5]'",
    ("data=x", "lambdas=0,0.5"): "lambdas is a list: type 'lambdas=[0,0.5]'",
    ("data=x", "dpo.beta=many"): NOT_A_FLOAT.format("many", "dpo.beta"),
    ("data=x", "lambdas=[a]"): NOT_A_FLOAT.format("a", "lambdas[0]"),
    ("data=x", "dpo.beta=-1"): "dpo.beta must be above 0, not -1.0",
    ("dpo.beta=3",): "data is missing: give data=...",
    ("data=x", "model=smal"): "there is no model=smal; type model=small, or another of small",
    ("data=x", "model=[small,big]"): "there is no model=big; there are small",
    ("data=x", "dpo.beta=1,2"): "type python -m toy --multirun dpo.beta=1,2 for a run of each",
    ("data=x", "lambdas=[0,,1]"): "cannot read lambdas=[0,,1]",
    ("data=/x/日本 a",): "cannot read data=/x/日本 a: type \"data='/x/日本 a'\"",
    ("data=a=$b",): "cannot read data=a=$b: type 'data='\"'\"'a=$b'\"'\"''",
    ("data=none",): "there is no data",
    ("data=strange",): "toy: deradiff ships no asset:a\\x1b[2J\\nb; it ships asset:",
    ("data=memory",): "there is not enough memory (alloc_cpu.cpp:127: can't allocate memory: you "
    "tried 9 bytes): give smaller batches",
    ("data=hub",): "the hub could not be read (ConnectTimeout: timed out): give local folders, or "
    "set HF_HOME",
    ("--data", "x"): "settings are written without dashes: type data=x",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_sentence_on_stderr_and_status_2(toy, arguments):
    done = toy(*arguments)
    assert done.returncode == MISTAKE_STATUS
    assert done.err.startswith("toy: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert MISTAKES[arguments] in done.err


def test_help_into_a_pipe_that_is_closed_early_is_no_bug(toy):
    process = toy.start("--help")
    process.stdout.close()  # as `| head` does
    assert process.wait() == 0
    assert process.stderr.read() == ""


def test_a_bug_keeps_its_traceback(toy):
    process = toy.start("data=bug")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" in err
    assert err.endswith("RuntimeError: a bug of ours\n")
    assert "hydra" not in err, "the traceback is of our own code"


def test_paths_are_looked_at_before_the_stage_is_imported(toy):
    done = toy("data=nowhere")
    assert done.returncode == MISTAKE_STATUS
    assert done.err == "toy: data=nowhere is not there\n"
