"""Checkpoints: everything that a run needs to resume bit for bit. They are written atomically and used only after
verification.

    e<epoch>-s<step>/
        weights.safetensors    trained parameters by name, fp32 (LoRA: the adapters)
        optimizer.safetensors  AdamW's moments and step count, by parameter name
        random.safetensors     the state of every random generator
        state.json             counters: step, cursor in examples, tokens, seconds, best loss, …
        manifest.json          written last: name, size and sha256 of the others, the run it belongs to, where it was made

Writing: into a temporary folder, each file flushed to disk, the manifest last, then one rename. Reading
verifies the manifest's sha256 (if the caller knows it), sizes, hashes, names and shapes, that numbers are
finite, and the same job, settings and data. Only safetensors and JSON, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FORMAT = 1
FILES = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
KEEP_LAST = 2


class Unreadable(Exception):
    """This checkpoint cannot be used. The message says why."""


@dataclass(frozen=True)
class Identity:
    """The run a checkpoint belongs to. A checkpoint of another job, other settings or other data is
    refused."""

    job: str | None
    settings: str  # hash of the settings as submitted
    data: str  # hash of the encoded examples
    base: str  # hash of the base model's configuration and trained shapes


@dataclass
class Snapshot:
    """The state after a step. The tensors are copies, so training can continue while they are written."""

    step: int
    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]
    identity: Identity
    environment: dict[str, Any]
    settings: dict[str, Any]  # resolved, so that an attempt on another machine computes the same
    base: str  # folder of the base model, needed to export this checkpoint
    implementation: str  # of the model, see models/load.py
    best: bool = False
    final: bool = False
    date: str | None = None  # the day that chat templates read

    @property
    def name(self) -> str:
        return f"e{self.epoch}-s{self.step}"


@dataclass
class Restored:
    """The content of a verified checkpoint, tensors on the CPU."""

    folder: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]


# ---- writing -----------------------------------------------------------------------------------------------


def write(snapshot: Snapshot, parent: Path) -> tuple[Path, dict[str, Any], str]:
    """Writes one checkpoint into `parent`. Returns its folder, its manifest and the manifest's sha256.

    A crash at any moment leaves either the whole checkpoint or a `tmp-…` folder that is never read. Raises
    OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f"tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        manifest = _write_files(snapshot, temporary)
        # The manifest comes last: a folder with a valid manifest has all its files.
        text = seal(manifest)
        sha256 = _write_bytes(temporary / "manifest.json", [text])
        _sync_folder(temporary)
        target = parent / snapshot.name
        if target.exists():  # from an earlier attempt at this step under the same lease
            shutil.rmtree(target)
        # rename is atomic; syncing the parent makes it survive a power failure
        temporary.rename(target)
        _sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target, manifest, sha256


def _write_files(snapshot: Snapshot, folder: Path) -> dict[str, Any]:
    tensors = {
        "weights.safetensors": snapshot.weights,
        "optimizer.safetensors": snapshot.optimizer,
        "random.safetensors": snapshot.random,
    }
    hashes = {name: write_tensors(folder / name, values) for name, values in tensors.items()}
    state = json.dumps(snapshot.state, indent=1, sort_keys=True, allow_nan=False).encode()
    hashes["state.json"] = _write_bytes(folder / "state.json", [state])
    return {
        "format": FORMAT,
        "step": snapshot.step,
        "epoch": snapshot.epoch,
        "best": snapshot.best,
        "final": snapshot.final,
        "identity": vars(snapshot.identity),
        "environment": snapshot.environment,
        "settings": snapshot.settings,
        "base": snapshot.base,
        "implementation": snapshot.implementation,
        "date": snapshot.date,
        "tensors": {
            name: {k: list(t.shape) for k, t in sorted(values.items())} for name, values in tensors.items()
        },
        "files": [
            {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
            for name, sha256 in hashes.items()
        ],
    }


def seal(manifest: dict[str, Any]) -> bytes:
    """The manifest as bytes. It contains its own hash (computed with that entry empty), so a flipped bit
    shows even to a reader that does not know the file's sha256."""
    bare = json.dumps(manifest | {"self": ""}, indent=1, sort_keys=True).encode()
    manifest["self"] = hashlib.sha256(bare).hexdigest()
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file, hashing it on the way, and flushes it to disk. Returns its sha256.

    The format is a little-endian uint64 with the header's length, the header as JSON padded to 8 bytes,
    then the data. (With the library's own writer, the file would have to be read again for the hash.)"""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    # the format wants the data to start at a multiple of 8
    text += b" " * (-len(text) % 8)
    parts = (t.detach().contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors.values())
    return _write_bytes(path, (struct.pack("<Q", len(text)) + text, *parts))


def _write_bytes(path: Path, parts: Any) -> str:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            for at in range(0, len(view), 1 << 24):  # 16 MB: still in the cache when it is hashed
                piece = view[at : at + (1 << 24)]
                digest.update(piece)
                # an unbuffered write may be partial
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading -----------------------------------------------------------------------------------------------


def read(
    folder: Path, identity: Identity, shapes: Mapping[str, list[int]], sha256: str | None = None
) -> Restored:
    """Reads a checkpoint after verifying all of it. `shapes` are those of the model's trained parameters.
    Raises Unreadable."""
    try:
        return _read(Path(folder), identity, shapes, sha256)
    except Unreadable:
        raise
    except Exception as error:  # a damaged file may fail anywhere in a parser
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _read(folder: Path, identity: Identity, shapes: Mapping[str, list[int]], sha256: str | None) -> Restored:
    manifest = verify_files(folder, sha256)
    # 1. the same run
    mine, theirs = vars(identity), manifest["identity"]
    for what in ("job", "settings", "data", "base"):
        if mine[what] != theirs.get(what):
            raise Unreadable(f"it belongs to another run: its {what} differs")
    # 2. the step in the name: a folder may have been copied or renamed
    match = folder.name.split("-s")
    if folder.name.startswith("e") and match[-1] != str(manifest["step"]):
        raise Unreadable("its folder's name gives a different step")
    # 3. names and shapes of all tensors
    weights, optimizer, random = (load_file(folder / name) for name in FILES[:3])
    state = json.loads((folder / "state.json").read_text())
    if {name: list(t.shape) for name, t in weights.items()} != dict(shapes):
        raise Unreadable("its parameters are not those of this model")
    wanted = {f"{kind}.{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    if {name: list(t.shape) for name, t in optimizer.items()} != wanted | {"step": []}:
        raise Unreadable("its optimizer state is not that of this model")
    # 4. finite fp32 numbers
    for name, t in (weights | optimizer).items():
        if t.dtype != torch.float32 or not bool(torch.isfinite(t).all()):
            raise Unreadable(f"{name} has numbers that are not finite")
    # 5. all files are of one step
    if state["step"] != manifest["step"] or int(optimizer["step"]) != state["step"]:
        raise Unreadable("its files are from different steps")
    return Restored(
        folder,
        manifest["step"],
        weights,
        optimizer,
        random,
        state,
        manifest["environment"],
        manifest["settings"],
    )


def verify_files(folder: Path, sha256: str | None = None) -> dict[str, Any]:
    """The manifest, after checking every file against it. Raises Unreadable."""
    manifest = read_manifest(folder, sha256)
    if sorted(f["name"] for f in manifest["files"]) != sorted(FILES):
        raise Unreadable("its manifest lists other files")
    if {path.name for path in folder.iterdir()} != {*FILES, "manifest.json"}:
        raise Unreadable("its folder has missing or unexpected files")
    for entry in manifest["files"]:
        path = folder / entry["name"]
        if path.is_symlink() or path.stat().st_size != entry["bytes"]:
            raise Unreadable(f"{path.name} has the wrong size")
        if file_sha256(path) != entry["sha256"]:
            raise Unreadable(f"{path.name} was changed: its sha256 differs")
    return manifest


def read_manifest(folder: Path, sha256: str | None = None) -> dict[str, Any]:
    """The manifest, after checking that it is exactly as it was written. Raises Unreadable."""
    try:
        if (folder / "manifest.json").is_symlink():
            raise Unreadable("its manifest is a symbolic link")
        text = (folder / "manifest.json").read_bytes()
    except OSError as error:
        raise Unreadable("it has no manifest, so it was not written completely") from error
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
        raise Unreadable("its manifest is not the one that was written")
    try:
        manifest = json.loads(text)
        same = seal(dict(manifest)) == text
    except (ValueError, TypeError) as error:
        raise Unreadable("its manifest was changed") from error
    if not same:
        raise Unreadable("its manifest was changed")
    if manifest["format"] != FORMAT:
        raise Unreadable(f"its format is {manifest['format']}, but this program reads only {FORMAT}")
    assert isinstance(manifest, dict)
    return manifest


def earlier_attempt(folders: list[Path], job: str | None, settings: str) -> dict[str, Any] | None:
    """The first valid manifest of this run among these checkpoints.

    A resumed attempt takes the resolved settings and the date from it. Resolved again, another machine would
    choose another micro-batch, which rounds differently; and on another day a chat template can write other
    tokens."""
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except Unreadable:
            continue
        if manifest["identity"]["job"] == job and manifest["identity"]["settings"] == settings:
            return manifest
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def candidates(pointer: Path, parents: list[Path]) -> list[Path]:
    """The requested checkpoint, then older ones next to it and in `parents`, latest step first."""
    step = step_of(pointer)
    older = {
        path
        for parent in {pointer.parent, *parents}
        if parent.is_dir()
        for path in parent.iterdir()
        if path.is_dir() and 0 <= step_of(path) < step
    }
    return [pointer, *sorted(older, key=step_of, reverse=True)]


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 for other folders."""
    try:
        return int(folder.name.split("-s")[1]) if folder.name.startswith("e") else -1
    except (IndexError, ValueError):
        return -1


# ---- in the background -------------------------------------------------------------------------------------

Written = Callable[[Snapshot, Path, dict[str, Any], str], None]


@dataclass
class Writer:
    """Writes checkpoints in a background thread, one at a time, and removes old ones.

    An error in the thread is raised again by the next `submit` or `wait`."""

    parent: Path
    written: Written
    protected: set[str] = field(default_factory=set)  # names that are never removed: the best checkpoint
    last_seconds: float = 0.0
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, snapshot: Snapshot) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        import time

        begun = time.perf_counter()
        try:
            folder, manifest, sha256 = write(snapshot, self.parent)
            if snapshot.best:
                self.protected = {folder.name}
            self.written(snapshot, folder, manifest, sha256)
            prune(self.parent, self.protected | {folder.name})
        except BaseException as error:
            self._error = error
        self.last_seconds = time.perf_counter() - begun


def prune(parent: Path, keep: set[str]) -> None:
    """Removes all but the last two and those in `keep`, each manifest first, so that a half-deleted folder
    is never used."""
    whole = sorted((p for p in parent.iterdir() if p.is_dir() and step_of(p) >= 0), key=step_of)
    for path in whole[:-KEEP_LAST]:
        if path.name not in keep:
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes temporary folders that a crash left behind."""
    if parent.is_dir():
        for path in parent.glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
