"""`python -m training export --checkpoint DIR --to DIR [--format NAME] [--dtype NAME]`: a checkpoint
becomes a model folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.engine import checkpoint
from training.export.folder import verify, write_folder
from training.models.config_json import read_config
from training.models.interface import LanguageModel
from training.models.load import add_lora, implementation_of, load_model
from training.plan import config, hub
from training.plan.events import Failure
from training.plan.export_formats import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint of a training run, or a folder of Hugging Face files",
    )
    parser.add_argument(
        "--base",
        help="the base model of the checkpoint, if it has moved: a folder, or a model name on the Hub",
    )
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument("--format", default="safetensors", choices=list(FORMATS))
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=sorted({dtype for format in FORMATS.values() for dtype in format.dtypes}),
    )


def main(args: argparse.Namespace) -> int:
    """Prints one JSON line: the files, and how they compare with the model in memory. Exit 1 if they are
    not close."""
    model, base, details = load_trained(Path(args.checkpoint), args.base)
    files = write_folder(model, args.to, base=base, format=args.format, dtype=args.dtype, details=details)
    result = verify(model, args.to, base=base, format=args.format)
    print(json.dumps({"files": files, "fidelity": result}))
    return 0 if result["close"] else 1


def load_trained(folder: Path, base: str | None) -> tuple[LanguageModel, Path, dict[str, Any]]:
    """Loads a checkpoint (trained from `base`) or a Hugging Face folder. Raises Failure.

    Returns the model, the folder of its tokenizer, and details for the model card."""
    if (folder / "config.json").is_file():
        return load_model(folder), folder, {}
    try:
        manifest = checkpoint.verify_files(folder)
    except (checkpoint.Unreadable, OSError, ValueError, KeyError) as error:
        raise Failure("checkpoint_unreadable", f"The checkpoint {folder} cannot be used: {error}.") from error
    base = base or str(manifest["base"])
    home, settings = hub.locate(base), manifest["settings"]
    model = load_model(home, implementation_of(read_config(home), manifest))
    s = config.parse_stored(settings)
    if s.adapter == "lora":
        add_lora(model, s)
    trained = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.copy_(trained.pop(name))
    if trained:
        raise Failure(
            "base_model", f"The checkpoint does not belong to {base}, which has no {next(iter(trained))}."
        )
    details = {"base": base, "steps": manifest["step"], "settings": settings}
    return model, home, details
