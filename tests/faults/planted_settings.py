"""The tests' settings, with the bug named by MUTANT planted at the start of the process."""

from tests.settings import *  # noqa: F403

INSTALLED_APPS = [*INSTALLED_APPS, "tests.faults.mutants.MutantConfig"]  # noqa: F405
