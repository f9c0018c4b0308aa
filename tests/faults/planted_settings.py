"""The tests' settings, with the bug that PLANT names put into the process at its start."""

from tests.settings import *  # noqa: F403

INSTALLED_APPS = [*INSTALLED_APPS, "tests.faults.mutants.MutantConfig"]  # noqa: F405
