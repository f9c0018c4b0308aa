"""The lock files list every installed package once, with its hashes, and agree with the requirements."""

from __future__ import annotations

import importlib.metadata
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.services import ROOT

# The build of PyTorch depends on the machine, and pip is installed before everything else.
NOT_LOCKED = {"torch", "pip"}


def locked(name: str) -> dict[str, str]:
    """The locked version of each package. Each must have a hash."""
    versions: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
        line, *hashes = [part.strip() for part in entry.split("\\\n")]
        package, version = line.split(" ")[0].split("==")
        assert hashes, line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", value) for value in hashes), line
        versions[canonicalize_name(package)] = version
    return versions


def requirements(name: str) -> list[Requirement]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


RUN, DEV = locked("requirements.lock"), locked("requirements-dev.lock")


def test_no_package_is_locked_in_two_places():
    assert not set(RUN) & set(DEV)
    assert not (ROOT / "constraints.txt").exists()


def test_requirements_are_locked_at_their_version():
    for file, lock in (("requirements.txt", RUN), ("requirements-dev.txt", RUN | DEV)):
        for requirement in requirements(file):
            if requirement.name not in NOT_LOCKED:
                version = lock[canonicalize_name(requirement.name)]
                assert str(requirement.specifier) == f"=={version}", requirement


def test_the_dependencies_of_requirements_are_locked_too():
    assert not with_dependencies(requirements("requirements.txt")) - set(RUN) - NOT_LOCKED
    assert not with_dependencies(requirements("requirements-dev.txt")) - set(RUN | DEV) - NOT_LOCKED


def test_nothing_else_is_locked():
    everything = with_dependencies(requirements("requirements.txt") + requirements("requirements-dev.txt"))
    only_older_python = {"async-timeout"}  # redis requires it up to Python 3.11.2
    assert set(RUN | DEV) - everything <= only_older_python


def with_dependencies(wanted: list[Requirement]) -> set[str]:
    """The names of these packages and of all their dependencies on this machine, by the installed metadata."""
    names: set[str] = set()
    waiting = [(canonicalize_name(one.name), frozenset(one.extras)) for one in wanted]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        names.add(name)
        for line in importlib.metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                if name == "torch" and canonicalize_name(one.name).startswith(("nvidia-", "cuda-", "triton")):
                    continue
                key = (canonicalize_name(one.name), frozenset(one.extras))
                if key not in seen:
                    seen.add(key)
                    waiting.append(key)
    return names


def test_both_ways_to_install_check_the_hashes():
    for name in ("bin/setup", "Dockerfile"):
        assert "--require-hashes --no-deps" in (ROOT / name).read_text()
