"""The structure of the code: layers, import cycles, the size of folders and functions. The layers are import-linter contracts
in pyproject.toml; each of them must fail when a forbidden import is added."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.services import ROOT

PACKAGES = ("llmtuner", "accounts", "jobs", "training")
MAX_MODULES = 25  # in one folder
EXCEPTIONS = {"training/engine/loop.py:train": 130}  # the training loop, in one function from top to bottom
MAX_LINES = 90


def sources(*folders: str) -> list[Path]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [path for path in paths if "migrations" not in path.parts]


# ---- layers ----------------------------------------------------------------------------------------------------------

# contract -> (module, an import that it must not have)
FORBIDDEN = {
    "llmtuner above jobs, jobs above accounts and training": (
        "accounts/forms.py",
        "import jobs.store.tables",
    ),
    "jobs: views and api above worker, worker above lifecycle, all above store": (
        "jobs/store/quotas.py",
        "import jobs.lifecycle.finalize",
    ),
    "training: data, text, plan and report below the engine, export and serving above it": (
        "training/data/sniff.py",
        "import training.text.encode",
    ),
    "training imports no web framework, queue, cloud or store": ("training/plan/hub.py", "import redis"),
    "jobs imports only the torch-free packages of training": (
        "jobs/lifecycle/estimates.py",
        "import training.engine.schedule",
    ),
    "No torch in web and Celery processes": ("training/report/check.py", "import torch"),
}


def broken_contracts(folder: Path) -> set[str]:
    """The names of the contracts that the code in this folder breaks."""
    program = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run(
        [program, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "Contracts" in result.stdout, result.stdout + result.stderr
    return {line.removesuffix(" BROKEN") for line in result.stdout.splitlines() if line.endswith(" BROKEN")}


def test_every_contract_is_kept() -> None:
    assert broken_contracts(ROOT) == set()


def test_every_contract_has_a_forbidden_import_to_test_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {contract["name"] for contract in settings["tool"]["importlinter"]["contracts"]} == set(FORBIDDEN)


@pytest.mark.parametrize("contract", FORBIDDEN)
def test_a_forbidden_import_breaks_its_contract(contract: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module, line = FORBIDDEN[contract]
    path = tmp_path / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    assert contract in broken_contracts(tmp_path)


# ---- import cycles and sizes -------------------------------------------------------------------------------------------


def imports() -> dict[str, set[str]]:
    """Each module with those of our modules that it imports, including late and type-only imports."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(*PACKAGES)
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else str(node.module) for name in full}
        graph[module] = {name for name in names if name in modules and name != module}
    return graph


def test_there_are_no_import_cycles() -> None:
    graph = imports()
    assert len(graph) > 200
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_folder_holds_too_many_modules() -> None:
    counts = Counter(
        str(path.parent.relative_to(ROOT)) for path in sources(*PACKAGES) if path.name != "__init__.py"
    )
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


def test_no_function_is_too_long() -> None:
    too_long = {}
    for path in sources(*PACKAGES, "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.name}"
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > EXCEPTIONS.get(name, MAX_LINES):
                    too_long[name] = lines
    assert too_long == {}


# ---- what runs where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["llmtuner.asgi", "llmtuner.celery"])
def test_web_and_celery_processes_load_no_torch(module: str, stores: None) -> None:
    code = f"import sys, django\ndjango.setup()\nimport {module}\n"  # a worker sets up Django when it starts
    code += "from django.urls import get_resolver\nget_resolver().url_patterns\n"
    code += "import jobs.worker.tasks\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ)


def test_nothing_loads_pickles_or_remote_code() -> None:
    forbidden = (
        "torch.load(",
        "import pickle",
        "from pickle",
        "joblib",
        "trust_remote_code=True",
        "shell=True",
    )
    uses = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in sources(*PACKAGES)
        for word in forbidden
        if word in path.read_text()
    ]
    assert not uses


# ---- documents -------------------------------------------------------------------------------------------------------


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([\w./]+(?:/|\.(?:py|txt|html|md|yml|toml)))`", text))
    folders = (*PACKAGES, "tests", "templates", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")] + list(ROOT.iterdir())
    paths = "".join(f"/{path.relative_to(ROOT)}\n" for path in files)
    assert not [name for name in named if f"/{name}" not in paths]
    assert len(named) > 40
