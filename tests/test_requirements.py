"""The locks are one list of everything that is installed, each with its hashes, and agree with what is asked for."""

from __future__ import annotations

import importlib.metadata
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.services import ROOT

# Which build of PyTorch is wanted differs by machine, and pip is there before anything else.
LEFT_OUT = {"torch", "pip"}


def locked(name: str) -> dict[str, str]:
    """Versions by package; each must have a hash."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
        line, *hashes = [part.strip() for part in entry.split("\\\n")]
        package, version = line.split(" ")[0].split("==")
        assert hashes, line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), line
        found[canonicalize_name(package)] = version
    return found


def asked(name: str) -> list[Requirement]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


RUN, DEV = locked("requirements.lock"), locked("requirements-dev.lock")


def test_no_package_is_locked_in_two_places():
    assert not set(RUN) & set(DEV)
    assert not (ROOT / "constraints.txt").exists()


def test_requirements_are_locked_at_their_version():
    for file, lock in (("requirements.txt", RUN), ("requirements-dev.txt", RUN | DEV)):
        for one in asked(file):
            if one.name not in LEFT_OUT:
                assert str(one.specifier) == f"=={lock[canonicalize_name(one.name)]}", one


def test_the_dependencies_of_requirements_are_locked_too():
    assert not needed(asked("requirements.txt")) - set(RUN) - LEFT_OUT
    assert not needed(asked("requirements-dev.txt")) - set(RUN | DEV) - LEFT_OUT


def test_nothing_else_is_locked():
    everything = needed(asked("requirements.txt") + asked("requirements-dev.txt"))
    only_older_python = {"async-timeout"}  # redis asks for it up to Python 3.11.2
    assert set(RUN | DEV) - everything <= only_older_python


def needed(wanted: list[Requirement]) -> set[str]:
    """Names of these and of all that they need here, as the installed packages say."""
    found: set[str] = set()
    waiting = [(canonicalize_name(one.name), frozenset(one.extras)) for one in wanted]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                if name == "torch" and canonicalize_name(one.name).startswith(("nvidia-", "cuda-", "triton")):
                    continue
                key = (canonicalize_name(one.name), frozenset(one.extras))
                if key not in seen:
                    seen.add(key)
                    waiting.append(key)
    return found


def test_both_ways_to_install_check_the_hashes():
    for name in ("bin/setup", "Dockerfile"):
        assert "--require-hashes --no-deps" in (ROOT / name).read_text()
