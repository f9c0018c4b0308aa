"""`python -m training COMMAND …`: train, standby, generate, serve, export, check, fix, rows.

Each command imports only what it needs: `check` and `--help` never wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from training.engine import memory
from training.plan.events import EXIT, Failure

COMMANDS = {
    "train": ("training.command", "train as the run file specifies; events on standard output"),
    "standby": ("training.command", "import everything, then wait for a run file on standard input"),
    "generate": ("training.models.generate", "generate text with a model"),
    "serve": ("training.serving.serve", "serve generation requests as JSON lines"),
    "export": ("training.export.command", "export a checkpoint as a model folder"),
    "import": ("training.models.import_base", "check a model and write the files of a base model"),
    "check": ("training.report.check", "read a dataset and report on it"),
    "fix": (
        "training.report.fix",
        "write a new version of a dataset: rows dropped, edited, merged or held out",
    ),
    "rows": ("training.data.pages", "show the rows of a dataset, page by page"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in COMMANDS:
        width = max(map(len, COMMANDS))
        print("usage: python -m training COMMAND …\n", file=sys.stderr)
        print(
            "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()), file=sys.stderr
        )
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command = arguments[0]
    memory.limit_primitive_caches()  # before torch is imported
    if command in ("train", "standby"):
        memory.configure_allocator()
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(prog=f"python -m training {command}", description=COMMANDS[command][1])
    module.add_arguments(parser)
    parser.set_defaults(command=command)
    try:
        code: int = module.main(parser.parse_args(arguments[1:]))
    except Failure as failure:
        print(f"{failure.message} {failure.advice}", file=sys.stderr)
        return EXIT[failure.reason]
    except Exception as error:
        words = _refusal(error)
        if not words:
            raise
        print(words, file=sys.stderr)
        return 2
    return code


def _refusal(error: Exception) -> str:
    """The message for a file or folder argument that cannot be read; empty for all other errors."""
    from training.text.tokenizer import TokenizerError

    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, TokenizerError):
        return f"The tokenizer cannot be used: {error}. Use the folder of a model with its tokenizer."
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
