"""The rules of the house, read from the syntax trees: who may import whom, how a line reads, and
what nobody may do."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deradiff
from tests.support.processes import succeeds

ROOT = Path(__file__).parents[1]
STAGES = ("train", "sample", "eval")
SHIPPED = ("deradiff", "configs", "hydra_plugins", *STAGES)
FOLDERS = (*SHIPPED, "tests", "benchmarks", "examples", "docs")
SOURCES = []
for folder in FOLDERS:
    SOURCES += sorted((ROOT / folder).rglob("*.py"))

MAY_HIDE_IMPORTS = {ROOT / "tests" / "conftest.py"}
"""Its fixtures load diffusers only for tests that need it."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# Which of our own packages a package may import. Each may import itself.
MAY_IMPORT = {
    "deradiff": set(),
    "configs": {"deradiff"},
    "hydra_plugins": {"configs", "deradiff"},
    **{stage: {"deradiff", "configs"} for stage in STAGES},
}
NOT_IN_LIBRARY = {"hydra", "omegaconf", "wandb"}

# Which rooms of the library a room may import; every room may use those files.
ROOMS_BELOW = {
    "method": set(),
    "worlds": {"method"},
    "scorers": {"worlds"},
    "models": set(),
    "data": {"models", "worlds"},
    "anchors": {"models"},
    "realignment": {"method", "models", "anchors"},
    "training": {"method", "models", "anchors", "data", "worlds", "realignment"},
    "evaluation": {"method", "models", "anchors", "scorers", "realignment", "training"},
    "calibration": {"models", "anchors", "realignment", "data", "training", "evaluation"},
}
SHARED_FILES = {
    "assets",
    "digests",
    "files",
    "hub",
    "image_files",
    "image_tables",
    "images",
    "locks",
    "progress",
    "run_directories",
    "terminal",
    "text_files",
    "texts",
    "command_line",
    "__init__",
    "__main__",
}

# They unpickle or execute what a file holds, or do not install beside CPU torch.
NOWHERE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NOWHERE |= {"torchvision", "open_clip", "hpsv2"}
NEVER_CALLED = {"eval", "exec", "__import__"}
NEVER_CALLED |= {"read_pickle", "to_pickle", "unsafe_load", "full_load"}

OPENS_IMAGES = ROOT / "deradiff" / "image_files.py"
"""The one file that decodes images: what it refuses, nothing else may open."""

PRINTS = ROOT / "deradiff" / "terminal.py"
"""The one file that prints: there, the text of a stranger is made harmless."""

IMAGE_READERS = {"imread", "load_image"}

# Imports inside functions: packages that not everyone has, or that a command loads only if asked.
OPTIONAL = {
    "torchao",
    "bitsandbytes",
    "deepspeed",
    "ipywidgets",
    "IPython",
    "submitit",
    "tensorboard",
    "wandb",
    "torch.utils.tensorboard",
}

COLUMNS = 100
TEXTS = {".md", ".yaml", ".yml", ".toml", ".sh", ".j2", ".css", ".cff", ".txt"}

RUFF_RULES = "C901,PLR0912,PLR0915,E501"
"""Complexity of at most 10, 12 branches and 50 statements a function, 100 columns a line."""


def module_name(file):
    """`deradiff.method.chain` for the path of a file below ROOT."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def names_of(node):
    """The dotted names that an import statement or an `import_module` call imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        # An exception of pickle's may be named, to be caught.
        if {alias.name for alias in node.names} == {"UnpicklingError"}:
            return []
        return ["." * node.level + (node.module or "")]
    if isinstance(node, ast.Call) and called_name(node) == "import_module":
        argument = node.args[0]
        return [argument.value] if isinstance(argument, ast.Constant) else []
    return []


def called_name(call):
    """The last part of what a call calls: `load` of `torch.load(...)`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return getattr(call.func, "id", "")


def imported_names(tree):
    """Every import of a tree, also those inside functions."""
    names = []
    for node in ast.walk(tree):
        names += names_of(node)
    return names


def wrong_imports(package, source):
    """The top-level packages that a file of `package` imports and may not."""
    tops = {name.split(".")[0] for name in imported_names(ast.parse(source))}
    wrong = tops & NOWHERE
    if package in MAY_IMPORT:
        wrong |= (tops & set(SHIPPED)) - MAY_IMPORT[package] - {package}
    if package == "deradiff":
        wrong |= tops & NOT_IN_LIBRARY
    return wrong


def unsafe_calls(source):
    """Calls that would run or unpickle what a file holds."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for node in calls:
        keywords = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        whole = ast.unparse(node.func)
        is_builtin = isinstance(node.func, ast.Name) and whole in NEVER_CALLED
        is_unsafe_method = called_name(node) in NEVER_CALLED - {"eval", "exec"}
        if whole.endswith("torch.load") and keywords.get("weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if whole == "yaml.load" or is_builtin or is_unsafe_method:
            yield f"line {node.lineno}: {whole}"
        runs_code = keywords.get("allow_pickle") or keywords.get("trust_remote_code")
        if runs_code or keywords.get("use_safetensors") is False:
            yield f"line {node.lineno}: {whole} would run or unpickle what a file holds"


def opened_images(source):
    """Calls that decode an image by another way than `deradiff.image_files`, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            whole = ast.unparse(node.func)
            if whole.endswith("Image.open") or called_name(node) in IMAGE_READERS:
                yield f"line {node.lineno}: {whole}"
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            yield f"line {node.lineno}: an import from PIL.Image"


def printed(source):
    """Calls that print by another way than `deradiff.terminal`, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and called_name(node) == "print":
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


def dense_expressions(source):
    """Expressions that hold more than one idea, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.IfExp) and holds_another(node, ast.IfExp):
            yield f"line {node.lineno}: a conditional expression inside another"
        if isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1:
                yield f"line {node.lineno}: a comprehension with two loops"
            if holds_another(node, COMPREHENSIONS):
                yield f"line {node.lineno}: a comprehension inside another"
        is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        if is_product and any(isinstance(s, ast.Compare) for s in (node.left, node.right)):
            yield f"line {node.lineno}: a number times a condition"


def holds_another(node, kinds):
    """Whether an expression holds another one of some kinds."""
    return any(isinstance(part, kinds) for part in ast.walk(node) if part is not node)


def hidden_imports(source):
    """Imports inside functions of packages that everyone has, with their lines."""
    tree = ast.parse(source)
    for_type_checkers = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_type_checkers |= set(node.body)

    for node in ast.walk(tree):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if not is_import or not node.col_offset or node in for_type_checkers:
            continue
        for name in names_of(node):
            if name not in OPTIONAL and name.split(".")[0] not in OPTIONAL:
                yield f"line {node.lineno}: {name}"


def relative_name(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=relative_name)
def test_file_keeps_to_the_house(file):
    source = file.read_text()
    package = file.relative_to(ROOT).parts[0]
    assert not wrong_imports(package, source)
    assert not list(unsafe_calls(source))
    is_test = file.is_relative_to(ROOT / "tests")
    assert is_test or file == OPENS_IMAGES or not list(opened_images(source))
    is_shipped = package in SHIPPED and file != PRINTS
    assert not is_shipped or not list(printed(source))
    assert "# fmt: " not in source or file == Path(__file__)
    assert not list(dense_expressions(source))
    assert file in MAY_HIDE_IMPORTS or not list(hidden_imports(source))


def test_functions_are_simple_and_lines_short():
    """By ruff, which counts branches better than we would."""
    command = [sys.executable, "-m", "ruff", "check", "--select", RUFF_RULES, "--quiet", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def long_lines(text):
    """The numbers of lines of over 100 columns. A table's row cannot be broken."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if len(line) > COLUMNS and not line.startswith("|")]


def test_lines_are_short_in_what_is_not_python_too():
    """Pages, configs, scripts and templates; by those of git, so that no build counts."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.splitlines()]
    files = [file for file in files if file.suffix in TEXTS and "assets" not in file.parts]
    assert len(files) > 100 or listed.returncode
    long = {relative_name(file): long_lines(file.read_text()) for file in files}
    assert not {name: numbers for name, numbers in long.items() if numbers}


def test_a_long_line_is_seen():
    assert long_lines("a" * 101 + "\n| " + "a" * 101 + "\n" + "a" * 100) == [1]


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


@pytest.mark.parametrize(
    "source",
    [
        "Image.open(file)",
        "PIL.Image.open(file)",
        "from PIL.Image import open",
        "plt.imread(file)",
    ],
)
def test_an_image_that_is_opened_elsewhere_is_seen(source):
    assert list(opened_images(source))


@pytest.mark.parametrize(
    "source",
    [
        "a if b else c if d else e",
        "a if b else f(c if d else e)",
        "[x for y in z for x in y]",
        "[sum(x for x in y) for y in z]",
        "step * (a == b)",
    ],
)
def test_a_dense_expression_is_seen(source):
    assert list(dense_expressions(source))


def test_a_hidden_import_is_seen():
    assert list(hidden_imports("def f():\n    import json"))
    assert not list(hidden_imports("import json\ndef f():\n    import torchao"))
    assert not list(hidden_imports("if TYPE_CHECKING:\n    import json"))


def test_what_is_right_passes():
    source = "import deradiff\nfrom configs import entry\nfrom eval.stage import run\nimport torch"
    assert not wrong_imports("eval", source)
    assert not list(unsafe_calls("torch.load(f, weights_only=True)\nm.eval()\nyaml.safe_load(f)"))
    assert not list(dense_expressions("[x for x in y if x]\na if b else c"))


def test_no_class_path_stands_in_a_config():
    assert not [
        file for file in (ROOT / "configs").rglob("*.yaml") if "_target_" in file.read_text()
    ]


def import_graph():
    """For each module of the library, the modules of the library that it imports at its top."""
    graph = {}
    for file in (ROOT / "deradiff").rglob("*.py"):
        names = []
        for node in ast.parse(file.read_text()).body:
            names += names_of(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
        graph[module_name(file)] = {name for name in names if name.startswith("deradiff")}
    return graph


def reachable(graph, name):
    """The modules that can be reached from a module, itself only where there is a circle."""
    reached = set()
    ahead = list(graph.get(name, ()))
    while ahead:
        target = ahead.pop()
        if target not in reached:
            reached.add(target)
            ahead += graph.get(target, ())
    return reached


def test_no_module_of_the_library_reaches_itself():
    graph = import_graph()
    assert not [name for name in graph if name in reachable(graph, name)]


def room_of(module):
    """`method` of `deradiff.method.chain`; "" for the files that every room may use."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "__init__"
    return "" if room in SHARED_FILES else room


def test_rooms_import_only_rooms_below_them():
    """Imports inside functions count, too."""
    wrong = []
    for file in (ROOT / "deradiff").rglob("*.py"):
        room = room_of(module_name(file))
        if not room:
            continue
        ours = [n for n in imported_names(ast.parse(file.read_text())) if n.startswith("deradiff.")]
        above = {room_of(name) for name in ours} - {room, ""} - ROOMS_BELOW[room]
        wrong += [f"{relative_name(file)} imports {target}" for target in sorted(above)]
    assert not wrong


def test_rooms_form_no_circle():
    for room in ROOMS_BELOW:
        assert room not in reachable(ROOMS_BELOW, room)


def test_the_library_loads_without_hydra_and_wandb():
    """By another process, in which both are made impossible to import."""
    modules = [module_name(file) for file in (ROOT / "deradiff").rglob("*.py")]
    modules = [name for name in modules if not name.endswith("__main__")]

    def load():
        for name in [*sys.modules]:
            if name.partition(".")[0] in {"deradiff", *NOT_IN_LIBRARY}:
                del sys.modules[name]
        sys.modules.update(dict.fromkeys(NOT_IN_LIBRARY))
        for name in modules:
            importlib.import_module(name)

    assert succeeds(load)


def test_the_library_does_not_speak_of_command_line_keys():
    """Its messages name arguments: a user of the library has no `data.path=`."""
    key = re.compile(r"\b(data|model|hub|scorers|optim|dpo|panel|finetune|tracking)\.[a-z_]+=")
    wrong = []
    for file in (ROOT / "deradiff").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and key.search(node.value):
                wrong.append(f"{relative_name(file)}:{node.lineno}")
    assert not wrong


def test_every_public_name_of_the_library_has_a_docstring():
    missing = []
    for file in (ROOT / "deradiff").rglob("*.py"):
        tree = ast.parse(file.read_text())
        if ast.get_docstring(tree) is None:
            missing.append(relative_name(file))
        for node in tree.body:
            is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{relative_name(file)}: {node.name}")
    assert not missing


def test_public_names_are_there_and_are_what_completion_shows():
    assert set(deradiff.__all__) <= set(dir(deradiff))
    for name in deradiff.__all__:
        assert getattr(deradiff, name).__name__ == name
    private = [name for name in dir(deradiff) if name.startswith("_") and name != "__version__"]
    assert not private
    assert importlib.import_module("deradiff.realignment.context").realign is deradiff.realign


def test_nothing_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|tmp)/\w")
    wrong = []
    for folder in SHIPPED:
        for ending in ("*.py", "*.yaml"):
            files = (ROOT / folder).rglob(ending)
            wrong += [relative_name(file) for file in files if pattern.search(file.read_text())]
    assert not wrong


def test_no_two_test_files_have_one_name():
    """pytest cannot collect both: the folders of tests/ are no packages."""
    names = [file.name for file in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert sorted(set(names)) == sorted(names)
