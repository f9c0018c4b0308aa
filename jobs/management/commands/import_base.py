"""`manage.py import_base FOLDER|FILE --name NAME` adds a base model from this machine's disk, for all users.

FOLDER has a model as transformers saves it, with safetensors weights; FILE is a zip file of one, or a GGUF file. The model is
checked, then its files are stored where every worker finds them. `--remove NAME` takes it off the list again.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from jobs.datasets import model_imports
from jobs.registry import imported_bases
from jobs.store.errors import Refused


class Command(BaseCommand):
    help = "Adds a base model from a folder, a zip file or a GGUF file, without the Hub."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("source", type=Path, nargs="?", metavar="FOLDER|FILE")
        parser.add_argument("--name", help="Its name, which users choose it by.")
        parser.add_argument("--license", default="", help="Its license, if its files do not give it.")
        parser.add_argument("--remove", metavar="NAME", help="Removes this base model instead.")

    def handle(
        self, *, source: Path | None, name: str | None, license: str, remove: str | None, **_: Any
    ) -> None:
        if remove:
            if imported_bases.find(remove) is None:
                raise CommandError(f"No base model named {remove} was imported.")
            imported_bases.remove(remove)
            self.stdout.write(f"{remove} was removed. Jobs that have not ended still use it.")
            return
        if source is None or not name:
            raise CommandError("Name a folder or a file, and its name with --name.")
        if not source.exists():
            raise CommandError(f"There is no folder or file {source}.")
        try:
            row = model_imports.import_base(source, name, license)
        except Refused as refused:
            raise CommandError(refused.message) from refused
        model = row.snapshot
        self.stdout.write(
            f"{name} was added: {model['parameters']:,} parameters, {model['context']:,} tokens of context, "
            f"license {model['licence']}."
        )
