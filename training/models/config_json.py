"""Reads a model folder's config.json: Hugging Face's description of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.plan.events import Failure


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises Failure("base_model") if it is missing, broken or not an
    object."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise Failure("base_model", f"There is no model in {folder}: config.json is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Failure("base_model", f"The model's {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise Failure("base_model", f"The model's {path} is not a configuration.")
    return values
