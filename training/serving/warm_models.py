"""The models that a server keeps in memory: loaded in a thread, evicted least recently used first."""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError

from training.models.decoder import Decoder
from training.models.generate import GenerateError
from training.models.load import load_model
from training.text.call_forms import CallForm
from training.text.tokenizer import Tokenizer
from training.text.tool_calls import call_form


@dataclass
class Loaded:
    """A model in memory. `users` counts the requests that are using it."""

    decoder: Decoder
    tokenizer: Tokenizer
    bytes: int
    users: int = 0

    @cached_property
    def call_form(self) -> CallForm | None:
        return call_form(self.tokenizer)


def load(folder: str) -> Loaded:
    """Loads a model folder for generation. Raises GenerateError if it cannot be used."""
    if not os.path.isabs(folder) or not Path(folder, "config.json").is_file():
        raise GenerateError("model_not_found", f"no model at {folder}")
    try:
        tokenizer, model = Tokenizer.load(folder), load_model(folder)
        decoder = model.decoder()
    except Exception as error:
        # Users must not see the server's paths.
        why = str(error).replace(f"{folder}/", "").replace(folder, "its folder")
        if is_damage(error):
            raise GenerateError("model_damaged", f"the model's weights are damaged: {why}") from error
        raise GenerateError("model_unusable", f"the model cannot be loaded: {why}") from error
    # in memory, fp32: the file may be smaller
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Loaded(decoder, tokenizer, size)


def is_damage(error: BaseException | None) -> bool:
    """Whether this error or its cause comes from a damaged safetensors file."""
    while error is not None:
        if isinstance(error, SafetensorError):
            return True
        error = error.__cause__ or error.__context__
    return False


class ModelCache:
    """Loaded models by folder."""

    def __init__(self, max_models: int, max_bytes: int) -> None:
        self.max_models, self.max_bytes = max_models, max_bytes
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.loading: dict[str, Future[Loaded]] = {}
        self.pool = ThreadPoolExecutor(1, "load")

    def get(self, folder: str) -> Loaded | None:
        """The model, or None while it is being loaded. Raises GenerateError if that fails."""
        if folder in self.loaded:
            self.loaded.move_to_end(folder)
            return self.loaded[folder]
        if folder not in self.loading:
            self.loading[folder] = self.pool.submit(load, folder)
        if not self.loading[folder].done():
            return None
        self.loaded[folder] = self.loading.pop(folder).result()
        self._make_room()
        return self.loaded[folder]

    def unload(self, folder: str) -> bool:
        """False if it is in use or not loaded."""
        if folder not in self.loaded or self.loaded[folder].users:
            return False
        del self.loaded[folder]
        return True

    def _make_room(self) -> None:
        newest = next(reversed(self.loaded))
        for folder, model in list(self.loaded.items()):
            too_many = len(self.loaded) > self.max_models
            if not too_many and sum(m.bytes for m in self.loaded.values()) <= self.max_bytes:
                return
            if not model.users and folder != newest:
                del self.loaded[folder]
