"""The arrows of the house: who may import whom, and who never loads torch."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_FREE = {
    "config",
    "formats",
    "tokenizer",
    "encode",
    "report",
    "events",
    "catalog",
    "auto",
    "estimate",
    "hub",
}
SERVER_LIBRARIES = {"django", "celery", "boto3", "botocore", "pynamodb", "redis", "kombu", "allauth", "ninja"}


def imports_of(path: Path) -> set[str]:
    """Dotted names a file imports, `from a import b` as a.b; relative ones made absolute."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def offenders(folder: str, is_wrong) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(folder)
        for name in imports_of(path)
        if is_wrong(name)
    ]


def test_training_knows_nothing_of_the_rest():
    ours = {"llmtuner", "accounts", "jobs"}
    assert not offenders("training", lambda name: name.split(".")[0] in ours | SERVER_LIBRARIES)


def test_jobs_imports_only_the_torch_free_parts_of_training():
    def is_wrong(name: str) -> bool:
        top, *rest = name.split(".")
        if top == "training":
            return not rest or rest[0] not in TORCH_FREE
        return top in {"torch", "transformers", "peft", "llmtuner"} and name != "llmtuner.celery.app"

    assert not offenders("jobs", is_wrong)


def test_accounts_knows_nothing_of_jobs_and_training():
    assert not offenders(
        "accounts", lambda name: name.split(".")[0] in {"llmtuner", "jobs", "training", "torch"}
    )


def test_pages_and_api_are_two_doors_that_do_not_know_each_other():
    assert not offenders("jobs/views", lambda name: name.startswith("jobs.api"))
    assert not offenders("jobs/api", lambda name: name.startswith("jobs.views"))


def test_the_torch_free_parts_import_no_torch():
    code = f"import sys\nfor name in {sorted(TORCH_FREE)!r}: __import__('training.' + name)\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["llmtuner.asgi", "llmtuner.celery"])
def test_web_and_celery_processes_import_no_torch(module: str, stores: None):
    code = f"import sys, django\ndjango.setup()\nimport {module}\n"  # a worker sets Django up as it starts
    code += "from django.urls import get_resolver\nget_resolver().url_patterns\n"
    code += "import jobs.worker.tasks\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ)


def test_nothing_loads_pickles_or_foreign_code():
    forbidden = (
        "torch.load(",
        "import pickle",
        "from pickle",
        "joblib",
        "trust_remote_code=True",
        "shell=True",
    )
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in ("llmtuner", "accounts", "jobs", "training")
        for path in files(folder)
        for word in forbidden
        if word in path.read_text()
    ]
    assert not found


@pytest.mark.parametrize("package", ["llmtuner", "accounts", "training", "jobs", "benchmarks"])
def test_the_readme_names_every_module(package: str) -> None:
    tree = (ROOT / "README.md").read_text().split("## How it works")[1]
    told = re.search(rf"^{package}/ .*\n(?:  .*\n)*", tree, re.MULTILINE)
    assert told
    named = set(re.findall(r"\b\w+\.py\b", told[0]))
    there = {
        path.name
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
        and not {"migrations", "management", "templatetags", "contenders"} & {*path.parts}
    }
    assert there - named == set()
    assert named - there == set()
