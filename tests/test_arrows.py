"""The arrows of the design as code: who may import whom, what no file may be called or call.

Reads the sources without importing them. A fault is a sentence that says what points the wrong way.
"""

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from models.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "training", "app")

DRAWERS = {"utils", "helpers", "common", "core", "base", "misc", "manager", "service", "handler"}

WEB = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp"}
DATABASE = {"sqlalchemy", "sqlite3", "psycopg"}
UNPICKLERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_IMPORTS = {
    "models": {"training", "app", *WEB, *DATABASE, *UNPICKLERS},
    "training": {"app", *WEB, *DATABASE, *UNPICKLERS},
    "app": UNPICKLERS,
}

# The parts of app from the ground up: each imports what lies below it, never a neighbour.
LEVELS = (
    {"settings", "errors", "metrics", "auth"},
    {"logs", "flags", "tracing"},
    {"engine", "jobs", "http"},
    {"evaluation"},
    {"promotion"},
    {"examiner"},
    {"api"},
    {"main", "key_commands"},
    {"__main__"},
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY_WITH_ITS_MODULE = {"torch.load", "os.environ", "os.getenv", "PIL.Image.open"}
TRAINERS = {
    *("app/api/dataset_archive.py", "app/api/dataset_intake.py", "app/api/dataset_pictures.py"),
    *("app/api/datasets.py", "app/api/evaluations.py", "app/api/fine_tuning.py"),
    "app/api/evaluation_upload.py",
    *("app/api/fine_tuning_curves.py", "app/api/fine_tuning_request.py", "app/api/files.py"),
    *("app/evaluation/answer.py", "app/evaluation/evaluator.py"),
    *("app/evaluation/out_of_fold.py", "app/evaluation/reader.py"),
    *("app/evaluation/rule.py", "app/evaluation/sitting.py", "app/promotion.py"),
    *("app/examiner.py", "app/jobs/work.py", "app/flags.py", "app/__main__.py"),
}

HEAVY = {
    *("torchvision", "torch._dynamo", "torchmetrics", "sklearn", "scipy"),
    *("matplotlib", "tensorboard", "captum"),
}


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Every production file as (path from the root, syntax tree)."""
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8")))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def imported_modules(path: str, tree: ast.Module) -> Iterator[str]:
    """The dotted name of every module the file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_at_the_top(path: str, tree: ast.Module) -> Iterator[str]:
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported_modules(path, ast.Module(list(imports), []))


def is_unpickling(name: str) -> bool:
    """True for all that pickle offers but its error, which torch's weights-only reader raises."""
    return name.startswith("pickle.") and name != "pickle.UnpicklingError"


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def nearest(name: str, modules: Container[str]) -> str:
    """The module that a dotted name is or lies in: "app.errors.BadInput" -> "app.errors"."""
    return name if name in modules else name.rpartition(".")[0]


def part_of_app(name: str) -> str:
    """The part of app that a dotted name lies in: "app.engine.live" -> "engine"."""
    part = name.split(".")[1]
    return "http" if part.startswith("http_") else part


def arrow_faults(path: str, tree: ast.Module) -> Iterator[str]:
    package = path.split("/")[0]
    for module in imported_modules(path, tree):
        root = module.split(".")[0]
        if root in FORBIDDEN_IMPORTS[package] or is_unpickling(module):
            yield f"{path} imports {module}: {why_not(root)}"
        if module in ONLY_WITH_ITS_MODULE:
            yield f"{path} imports {module} by its bare name, so that no reader sees whose it is"
        if package == "app" and root == "app":
            yield from inner_arrow_faults(path, module)
        if package == "app" and root == "training" and path not in TRAINERS:
            yield f"{path} imports {module}: only {', '.join(sorted(TRAINERS))} import training"


def why_not(root: str) -> str:
    if root == "pickle" or root in UNPICKLERS:
        return "nothing that a user sent is ever unpickled"
    return "arrows point down" if root in PACKAGES else "below app is no web and no database"


def inner_arrow_faults(path: str, module: str) -> Iterator[str]:
    if path == "app/__init__.py":
        return
    here, there = part_of_app(module_name(path)), part_of_app(module)
    if here == there:
        return
    if here not in LEVEL_OF:
        yield f"{path} has no place in the arrows of app: give {here} one in tests/test_arrows.py"
    elif LEVEL_OF.get(there, len(LEVELS)) >= LEVEL_OF[here]:
        yield f"{path} imports {module}: arrows point down"


def name_faults(path: str, tree: ast.Module) -> Iterator[str]:
    names = [part.removesuffix(".py") for part in path.split("/")]
    names += [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for name in names:
        drawer = next((word for word in DRAWERS if is_drawer(name, word)), None)
        if drawer:
            yield f"{path} has the name {name}: {drawer} says nothing, find the noun"


def is_drawer(name: str, word: str) -> bool:
    """True for the word itself as a file, and for a class that ends in it: JobManager."""
    return name.lower().strip("_") == word or name.endswith(word.capitalize())


def call_faults(path: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (f"{path}:{node.lineno} {fault}" for fault in faults_of_call(path, node))
        if isinstance(node, ast.Attribute) and is_unpickling(ast.unparse(node)):
            yield f"{path}:{node.lineno} uses {ast.unparse(node)}: nothing is ever unpickled"
        if path.startswith("training") and ast.unparse(node) in {"os.environ", "os.getenv"}:
            yield f"{path} reads the environment: training takes what it is given"


def faults_of_call(path: str, call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if keywords.get("weights_only") == "False" or keywords.get("allow_pickle") == "True":
        yield "would unpickle what it reads"
    if function == "torch.load" and keywords.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if function.endswith(".extractall"):
        yield "extracts an archive by the names inside it: read it through models/archive.py"
    if function.endswith("Image.open") and "formats" not in keywords:
        yield "calls Image.open without formats=, which tries every decoder Pillow has"
    if function == "request.json":
        yield "calls request.json(), which has no bound"
    if function == "print" and not path.endswith("__main__.py"):
        yield "prints: only __main__ speaks to the terminal"


def faults(path: str, source: str | ast.Module) -> list[str]:
    tree = ast.parse(source) if isinstance(source, str) else source
    return [
        *arrow_faults(path, tree),
        *name_faults(path, tree),
        *call_faults(path, tree),
    ]


def test_the_arrows_hold() -> None:
    found = [fault for path, tree in sources() for fault in faults(path, tree)]
    assert not found, "\n".join(found)


def test_no_module_needs_itself_through_others() -> None:
    modules = {module_name(path): (path, tree) for path, tree in sources()}
    graph = {
        name: {nearest(found, modules.keys()) for found in imports_at_the_top(path, tree)}
        for name, (path, tree) in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the ring


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("models/store.py", "import app.errors", "models/store.py imports app.errors"),
        ("models/store.py", "def f():\n    from app import errors", "imports app.errors: arrows"),
        ("training/fit.py", "import fastapi", "is no web"),
        ("training/fit.py", "import os\nos.environ['HOME']", "reads the environment"),
        ("training/fit.py", "from os import environ", "by its bare name"),
        ("app/engine/live.py", "from app.api import predict", "arrows point down"),
        ("app/engine/live.py", "from ..jobs import store", "imports app.jobs.store"),
        ("app/engine/live.py", "from .. import jobs", "imports app.jobs"),
        ("app/engine/live.py", "import training.fit", "import training"),
        ("app/api/predict.py", "import app.main", "arrows point down"),
        ("app/errors.py", "from app.settings import Settings", "arrows point down"),
        ("app/cache.py", "from app.settings import Settings", "has no place"),
        ("app/api/utils.py", "", "has the name utils"),
        ("app/jobs/store.py", "class JobManager: ...", "has the name JobManager"),
        ("models/archive.py", "import dill", "is ever unpickled"),
        ("models/archive.py", "import pickle\npickle.loads(data)", "uses pickle.loads"),
        ("models/archive.py", "from pickle import loads", "is ever unpickled"),
        ("models/archive.py", "from torch import load", "by its bare name"),
        ("models/archive.py", "torch.load(file)", "without weights_only=True"),
        ("models/archive.py", "torch.load(file, weights_only=False)", "unpickle"),
        ("models/archive.py", "numpy.load(file, allow_pickle=True)", "unpickle"),
        ("models/archive.py", "archive.extractall(folder)", "extracts an archive"),
        ("models/picture.py", "PIL.Image.open(file)", "without formats="),
        ("app/api/predict.py", "await_ = request.json()", "has no bound"),
        ("app/api/predict.py", "print(1)", "prints"),
    ],
)
def test_a_fault_is_a_sentence(path: str, source: str, sentence: str) -> None:
    found = faults(path, source)
    assert any(sentence in fault for fault in found), found


def modules_loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


FIRST_PREDICT = """
from starlette.testclient import TestClient
from app.main import create_app
from app.settings import Settings

settings = Settings(home={home!r}, device="cpu", threads=1)
with TestClient(create_app(settings), "http://127.0.0.1") as client:
    answer = client.post("/v1/models/digits/predict", files={{"file": {picture!r}}})
    assert answer.status_code == 200, answer.text
"""


@pytest.mark.slow  # a process that imports torch; `make check` runs it too
def test_a_first_predict_loads_nothing_heavy(store: ModelStore, digit_png: bytes) -> None:
    home = str(store.folder.parent)
    loaded = modules_loaded_by(FIRST_PREDICT.format(home=home, picture=digit_png))
    assert "torch" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("module", ["config", "dataset_store"])
def test_what_the_http_side_needs_of_training_loads_no_torch(module: str) -> None:
    if not (ROOT / "training" / f"{module}.py").is_file():
        pytest.skip(f"training/{module}.py is not there yet")
    assert "torch" not in modules_loaded_by(f"import training.{module}")
