"""The walls of the house, read from the syntax trees: who may import whom, and what nobody may do."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("train", "sample", "eval")
OURS = ("deradiff", "configs", "hydra_plugins", *STAGES)
SOURCES = [
    file
    for folder in (*OURS, "tests", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
MAY_IMPORT = {  # of our own packages; each may import itself
    "deradiff": set(),
    "configs": {"deradiff"},
    "hydra_plugins": {"configs"},
    **{stage: {"deradiff", "configs"} for stage in STAGES},
}
NOT_IN_LIBRARY = {"hydra", "omegaconf", "wandb"}
NOWHERE = {  # they unpickle or execute what a file holds, or do not install beside CPU torch
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "torchvision",
    "open_clip",
    "hpsv2",
}
NEVER_CALLED = {
    "eval",
    "exec",
    "__import__",
    "read_pickle",
    "to_pickle",
    "unsafe_load",
    "full_load",
}


def imported(tree):
    """Dotted names of every import in the tree, lazy and TYPE_CHECKING ones too; an exception of pickle's may be named, to be caught."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} != {
            "UnpicklingError"
        }:
            yield "." * node.level + (node.module or "")
        elif (
            isinstance(node, ast.Call)
            and called(node) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


def called(node):
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def wrong_imports(package, source):
    tops = {name.split(".")[0] for name in imported(ast.parse(source))}
    wrong = tops & NOWHERE
    if package in MAY_IMPORT:
        wrong |= (tops & set(OURS)) - MAY_IMPORT[package] - {package}
    if package == "deradiff":
        wrong |= tops & NOT_IN_LIBRARY
    return wrong


def unsafe_calls(source):
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        keywords = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        whole = ast.unparse(node.func)
        if whole.endswith("torch.load") and keywords.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if (
            whole == "yaml.load"
            or (isinstance(node.func, ast.Name) and whole in NEVER_CALLED)
            or called(node) in NEVER_CALLED - {"eval", "exec"}
        ):
            yield f"line {node.lineno}: {whole}"
        if (
            keywords.get("allow_pickle")
            or keywords.get("trust_remote_code")
            or keywords.get("use_safetensors") is False
        ):
            yield f"line {node.lineno}: {whole} would run or unpickle what a file holds"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_to_the_house(file):
    source = file.read_text()
    assert not wrong_imports(file.relative_to(ROOT).parts[0], source)
    assert not list(unsafe_calls(source))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("deradiff", "import wandb"),
        ("deradiff", "def f():\n    from omegaconf import OmegaConf"),
        ("deradiff", "import configs.entry"),
        ("deradiff", "import importlib\nimportlib.import_module('hydra.core')"),
        ("train", "from sample.manifest import merge"),
        ("eval", "import train.config"),
        ("sample", "if True:\n    import eval.stage"),
        ("configs", "import train"),
        ("hydra_plugins", "from train import stage"),
        ("tests", "import pickle"),
        ("eval", "import torchvision.transforms"),
    ],
)
def test_a_wrong_import_is_seen(package, source):
    assert wrong_imports(package, source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=safe)",
        "eval(text)",
        "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "yaml.load(f)",
        "load_dataset(x, trust_remote_code=True)",
        "U.from_pretrained(x, use_safetensors=False)",
    ],
)
def test_an_unsafe_call_is_seen(source):
    assert list(unsafe_calls(source))


def test_what_is_right_passes():
    assert not wrong_imports(
        "eval",
        "import deradiff\nfrom configs import entry\nfrom deradiff.evaluation.report.report import write\nimport torch",
    )
    assert not list(
        unsafe_calls("torch.load(f, weights_only=True)\nmodel.eval()\nyaml.safe_load(f)")
    )


def test_no_class_path_stands_in_a_config():
    assert not [
        file for file in (ROOT / "configs").rglob("*.yaml") if "_target_" in file.read_text()
    ]


def test_the_library_imports_in_one_direction():
    """Ignoring imports inside functions and for type checkers, no module of deradiff reaches itself."""
    graph = {}
    for file in (ROOT / "deradiff").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        top = ast.Module(
            [
                n
                for n in ast.parse(file.read_text()).body
                if isinstance(n, ast.Import | ast.ImportFrom)
            ],
            [],
        )
        graph[name] = {target for target in imported(top) if target.startswith("deradiff")}

    def reach(name, seen):
        for target in graph.get(name, set()) - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    assert not {name for name in graph if name in reach(name, set())}


def test_the_library_loads_without_hydra_and_wandb():
    """By another process, in which both are made impossible to import."""
    import subprocess

    modules = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for f in (ROOT / "deradiff").rglob("*.py")
    ]
    forbid = f"for name in {sorted(NOT_IN_LIBRARY)}: sys.modules[name] = None"
    code = f"import sys, importlib\n{forbid}\nfor name in {modules}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_public_names_are_there_and_are_what_completion_shows():
    import deradiff

    assert set(deradiff.__all__) <= set(dir(deradiff))
    assert all(getattr(deradiff, name).__name__ == name for name in deradiff.__all__)
    assert not [name for name in dir(deradiff) if name.startswith("_") and name != "__version__"]


def test_nothing_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|tmp)/\w")
    files = [
        f for folder in OURS for kind in ("*.py", "*.yaml") for f in (ROOT / folder).rglob(kind)
    ]
    assert not [
        f"{file}: {found[0]}" for file in files if (found := pattern.search(file.read_text()))
    ]
