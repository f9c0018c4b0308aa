"""`python -m training import SOURCE --to FOLDER`: checks a model on this machine and writes the files of a base model.

SOURCE is a folder of Hugging Face files, a zip file of one, or a GGUF file, which is converted. It is not trusted: run this
in a process with limits. Only the files of `hub.WANTED` are written, and no weights are read into memory except a GGUF's:
the headers of the safetensors files are compared with the architecture. One event is printed: `t` is "import", with `model`
(the fields of plan.catalog.BaseModel) or with `error`, a sentence that says why the model was refused.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from training.models.config_json import read_config
from training.plan import catalog, hub
from training.plan.events import Failure
from training.report.check import emit
from training.text.tokenizer import Tokenizer

MAX_FILES = 10_000
TOKENIZER_S = 60.0  # for all that is tried with the tokenizer
MAX_CARD = 1 << 16  # bytes of a README.md that are searched for the license
MAX_TEXT = 256 << 20  # bytes of a file other than weights
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Source(NamedTuple):
    """A file of the model, in a folder or a zip file."""

    size: int
    open: Callable[[], IO[bytes]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder, a zip file or a GGUF file")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    parser.add_argument("--limit-bytes", type=int, help="refuse a model larger than this")


def main(given: argparse.Namespace) -> int:
    """Exit 0 if the model was checked, whatever the result."""
    try:
        emit({"t": "import", "model": import_model(given.source, given.to, given.limit_bytes)})
    except Failure as failure:
        emit({"t": "import", "error": str(failure)})
    except MemoryError:
        emit({"t": "import", "error": "The check of the model needs more memory than it may use."})
    except Exception as error:  # damaged files make libraries raise anything
        traceback.print_exception(error)
        emit(
            {"t": "import", "error": f"The model cannot be read: {type(error).__name__}: {str(error)[:200]}"}
        )
    return 0


def import_model(source: Path, to: Path, limit_bytes: int | None = None) -> dict[str, Any]:
    """Writes the files of the base model to the folder `to` and checks them. Returns the fields of
    plan.catalog.BaseModel. Raises Failure("base_model")."""
    to.mkdir(parents=True, exist_ok=True)
    with _files_of(source) as files:
        licence = _copy(files, to, limit_bytes)
    try:
        config = read_config(to)
    except Failure as failure:
        raise _refused(str(failure).replace(f"{to}/", "")) from failure
    if refusal := hub.config_refusal("The model", config):
        raise _refused(refusal)
    _check_architecture(config)
    _check_safetensors(to)
    parameters = _check_weights(to)
    _check_tokenizer(to)
    try:
        model = catalog.describe(to)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise _refused(f"The model cannot be used: {error}.") from error
    return replace(model, parameters=parameters, licence=licence or "unknown", folder="").as_dict()


def _refused(message: str) -> Failure:
    return Failure("base_model", message)


# ---- files -------------------------------------------------------------------------------------------------


@contextmanager
def _files_of(source: Path) -> Iterator[dict[str, Source]]:
    """The files of a folder or a zip file by their path in it, or a GGUF file alone."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())[:MAX_FILES]
        yield {
            path.relative_to(source).as_posix(): Source(path.stat().st_size, partial(io.FileIO, path))
            for path in paths
        }
    elif not source.is_file():
        raise _refused(f"There is no folder or file {source}.")
    elif zipfile.is_zipfile(source):
        with _damaged_zip_refused(), zipfile.ZipFile(source) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()][:MAX_FILES]
            yield {entry.filename: Source(entry.file_size, partial(archive.open, entry)) for entry in entries}
    else:
        yield {source.name: Source(source.stat().st_size, partial(io.FileIO, source))}


@contextmanager
def _damaged_zip_refused() -> Iterator[None]:
    try:
        yield
    # what zipfile raises for damaged, encrypted and unsupported entries
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise _refused(f"The zip file cannot be read: {error}.") from error


def _copy(files: dict[str, Source], to: Path, limit_bytes: int | None) -> str:
    """Writes the files that a base model needs, converting a GGUF file. Returns its license, or ""."""
    config = min((n for n in files if PurePosixPath(n).name == "config.json"), key=_depth, default=None)
    if config is None:
        return _convert(files, to, limit_bytes)
    root = config.removesuffix("config.json")
    inside = {name.removeprefix(root): file for name, file in files.items() if name.startswith(root)}
    wanted = {name: file for name, file in inside.items() if hub.is_wanted(name) and ".." not in name}
    if not any(name.endswith(".safetensors") for name in wanted):
        pickles = [name for name in inside if name.endswith(PICKLES)]
        raise _refused(
            f"There are no safetensors weights, only {pickles[0]}, a format that can execute code when it is loaded. "
            "Save the model with save_pretrained of transformers, which writes safetensors."
            if pickles
            else "There are no safetensors weights in it. Save the model with save_pretrained of transformers."
        )
    if "tokenizer.json" not in wanted and not {"vocab.json", "merges.txt"} <= set(wanted):
        raise _refused("There is no tokenizer.json in it. Save the tokenizer with save_pretrained as well.")
    _check_size(sum(file.size for file in wanted.values()), limit_bytes)
    for name, file in wanted.items():
        if not name.endswith(".safetensors") and file.size > MAX_TEXT:
            raise _refused(f"{name} has {file.size:,} bytes; the limit is {MAX_TEXT:,}.")
        _write(file, to / name)
    card = inside.get("README.md")
    return _license_of_card(card) if card else ""


def _convert(files: dict[str, Source], to: Path, limit_bytes: int | None) -> str:
    named = [name for name in files if name.endswith(".gguf")]
    if len(named) != 1:
        raise _refused(
            "There are several GGUF files in it. Choose one of them."
            if named
            else "It is neither a folder of Hugging Face files, with config.json and safetensors weights, nor a GGUF file."
        )
    _transformers()
    from training.models.gguf import convert_gguf

    file = files[named[0]]
    _check_size(file.size, limit_bytes)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        path = Path(folder) / "model.gguf"
        _write(file, path)
        convert_gguf(path, to)
        return _license_of_gguf(path)


def _check_size(size: int, limit_bytes: int | None) -> None:
    if limit_bytes and size > limit_bytes:
        raise _refused(f"The model has {size:,} bytes; the limit is {limit_bytes:,} (HUB_MAX_GB).")


def _write(file: Source, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open() as content, path.open("wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)


def _depth(name: str) -> tuple[int, str]:
    return name.count("/"), name


def _license_of_card(card: Source) -> str:
    """The license in the metadata at the top of a model card."""
    with card.open() as file:
        text = file.read(MAX_CARD).decode("utf-8", "replace")
    metadata = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    named = (
        re.search(r"^license:[ \t]*['\"]?([\w.+ -]{1,60})", metadata[1], re.MULTILINE) if metadata else None
    )
    return named[1].strip() if named else ""


def _license_of_gguf(path: Path) -> str:
    from transformers.integrations import gguf

    library: Any = gguf  # its functions are not declared as exported
    metadata, _ = library.read_gguf_metadata(str(path), ())
    return str(metadata.get("general.license") or "")[:60]


def _transformers() -> Any:
    """The library, imported only when it is needed, since that takes seconds. Problems are reported by us."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in the log
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    return transformers


# ---- checks ------------------------------------------------------------------------------------------------


def _check_architecture(config: dict[str, Any]) -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(config.get("model_type", ""))[:100]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _refused(f"transformers {__version__} has no causal language model of the type {kind!r}.")


def _check_safetensors(folder: Path) -> None:
    """The headers are well formed, and an index names only files of this folder."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise _refused(f"{path.name} is not a valid safetensors file: {str(error)[:200]}.") from error
    for path in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(path.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refused(f"{path.name} is not a valid index of weights.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise _refused(f"{path.name} names a file that is not in the folder: {str(name)[:100]}.")


def _check_weights(folder: Path) -> int:
    """Whether the weights are those of the architecture, by their names and shapes. Returns their number."""
    try:
        model, loaded = _transformers().AutoModelForCausalLM.from_pretrained(
            str(folder),
            device_map="meta",  # names and shapes only
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # transformers raises anything: ValueError, KeyError, ImportError, its own
        words = str(error).replace(str(folder), "the folder")[:300]
        raise _refused(f"transformers cannot load the model: {words}") from error
    for problem, names in (
        ("do not have the shape that its config.json gives", [each[0] for each in loaded["mismatched_keys"]]),
        ("are missing", loaded["missing_keys"]),
    ):
        if names:
            raise _refused(
                f"{len(names)} of the model's weights {problem}, for example {min(names)}. "
                "Choose a complete model."
            )
    return sum(parameter.numel() for parameter in model.parameters())


def _check_tokenizer(folder: Path) -> None:
    """The tokenizer can be read, fits the weights, and its chat template renders, all of it in reasonable time."""
    problems: list[str] = []
    # A regular expression or a template can take forever. Such a thread ends with this process.
    thread = threading.Thread(target=lambda: problems.append(_tokenizer_problem(folder)), daemon=True)
    thread.start()
    thread.join(TOKENIZER_S)
    if not problems:
        raise _refused("The tokenizer cannot be used: reading a short text with it takes too long.")
    if problems[0]:
        raise _refused(f"The tokenizer cannot be used: {problems[0]}.")


def _tokenizer_problem(folder: Path) -> str:
    try:
        tokenizer = Tokenizer.load(folder)
        largest, rows = (
            max(tokenizer.backend.get_vocab().values(), default=-1),
            catalog.describe(folder).vocab,
        )
        if largest >= rows:
            return f"it has tokens up to {largest:,}, but the model has {rows:,}"
        if fault := tokenizer.template_fault:
            return f"its chat template does not render: {fault}"
        # Many regular expressions that take forever do so on a repeated letter.
        if not all(tokenizer.encode_batch(["A lamp is lit.", "a" * 100 + "!", " " * 100 + "."])):
            return "it makes no tokens of a text"
        assert tokenizer.ends.ids
    except BaseException as error:  # damaged files make the tokenizers library, written in Rust, panic
        return str(error).replace(str(folder), "the folder")[:300] or type(error).__name__
    return ""
