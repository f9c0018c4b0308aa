"""A checkpoint is either complete or rejected: 200 kinds of damage, after each of which the older one is used."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.engine.test_resume import _reseal, _rewrite
from tests.training.running import Event, Runner, of
from training.engine import checkpoint
from training.engine.checkpoint import FILES, Identity, Snapshot, Unreadable, Writer

SHAPES = {"a.weight": [40, 8], "a.bias": [8]}
IDENTITY = Identity("ftjob-1", "settings", "data", "base")
ALL = [*FILES, "manifest.json"]


def snapshot(step: int, *, best: bool = False, final: bool = False) -> Snapshot:
    rng = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    moments = {
        f"{kind}.{name}": t.square() for kind in ("exp_avg", "exp_avg_sq") for name, t in weights.items()
    }
    optimizer = moments | {"step": torch.tensor(float(step))}
    state = {"step": step, "cursor": step * 8}
    return Snapshot(
        step,
        1,
        weights,
        optimizer,
        {"torch": rng.get_state()},
        state,
        IDENTITY,
        {"torch": "2"},
        {},
        "/base",
        "native",
        best,
        final,
    )


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """An older checkpoint and a newer one."""
    return checkpoint.write(snapshot(7), tmp_path)[0], checkpoint.write(snapshot(14), tmp_path)[0]


def read(folder: Path, sha256: str | None = None) -> checkpoint.Restored:
    return checkpoint.read(folder, IDENTITY, SHAPES, sha256)


def test_a_checkpoint_is_read_back_as_written(tmp_path: Path) -> None:
    shot = snapshot(7)
    folder, manifest, sha256 = checkpoint.write(shot, tmp_path)
    stored = read(folder, sha256)
    assert folder.name == "e1-s7"
    assert all(torch.equal(stored.weights[name], t) for name, t in shot.weights.items())
    assert all(torch.equal(stored.optimizer[name], t) for name, t in shot.optimizer.items())
    assert stored.state == shot.state
    assert {f["name"] for f in manifest["files"]} == set(FILES)


Damage = Callable[[Path, Path], object]  # (folder, an older good one)


def truncate(name: str, tenth: int) -> Damage:
    def damage(folder: Path, older: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size * tenth // 10)

    return damage


def flip(name: str, seed: int) -> Damage:
    def damage(folder: Path, older: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        rng = random.Random(f"{name}{seed}")
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)

    return damage


def swap(name: str) -> Damage:
    return lambda folder, older: shutil.copyfile(older / name, folder / name) and None


def remove(name: str) -> Damage:
    return lambda folder, older: (folder / name).unlink()


def link(name: str) -> Damage:
    def damage(folder: Path, older: Path) -> None:
        moved = (folder / name).rename(folder.parent / f"moved-{name}")
        (folder / name).symlink_to(moved)

    return damage


def extra(folder: Path, older: Path) -> None:
    (folder / "weights.bin").write_bytes(b"pickle")


def junk(folder: Path, older: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"\xff" * 8 + b"{" * 100)
    _reseal(folder)


def all_of_another_step(folder: Path, older: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


def resealed(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """Valid hashes, wrong contents."""
    return lambda folder, older: _rewrite(folder, name, change)


def another_identity(key: str) -> Damage:
    def damage(folder: Path, older: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["identity"][key] = "another"
        (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))

    return damage


def another_format(folder: Path, older: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))


def not_finite(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(iter(tensors.values())).view(-1)[3] = value
        return tensors

    return change


def damages() -> Iterator[tuple[str, Damage]]:
    for name in ALL:
        yield from ((f"{name} cut to {tenth}0%", truncate(name, tenth)) for tenth in range(10))
        yield from ((f"bit {seed} of {name}", flip(name, seed)) for seed in range(26))
        yield f"{name} missing", remove(name)
        yield f"{name} of another step", swap(name)
        yield f"{name} a link", link(name)
    yield "an additional file", extra
    yield "junk", junk
    yield "all of another step", all_of_another_step
    yield "another format", another_format
    for key in ("job", "settings", "data", "base"):
        yield f"another {key}", another_identity(key)
    yield "wrong shape", resealed("weights", lambda t: t | {"a.bias": torch.zeros(9)})
    yield "an additional tensor", resealed("weights", lambda t: t | {"b": torch.zeros(1)})
    yield (
        "a missing tensor",
        resealed("optimizer", lambda t: {k: v for k, v in t.items() if k != "exp_avg.a.bias"}),
    )
    yield "another type", resealed("weights", lambda t: {k: v.double() for k, v in t.items()})
    yield "another count of steps", resealed("optimizer", lambda t: t | {"step": torch.tensor(3.0)})
    for name in ("weights", "optimizer"):
        yield from (
            (f"{value} in {name}", resealed(name, not_finite(value)))
            for value in (float("nan"), float("inf"))
        )


def test_each_of_200_damaged_checkpoints_is_rejected_and_the_older_one_used(tmp_path: Path) -> None:
    older, _, _ = checkpoint.write(snapshot(7), tmp_path / "good")
    newer, _, _ = checkpoint.write(snapshot(14), tmp_path / "good")
    accepted, count = [], 0
    for i, (name, damage) in enumerate(damages()):
        place = tmp_path / f"m{i}"
        shutil.copytree(tmp_path / "good", place)
        damage(place / newer.name, place / older.name)
        count += 1
        if _first_readable(checkpoint.candidates(place / newer.name, [])) != place / older.name:
            accepted.append(name)
        shutil.rmtree(place)
    assert accepted == []
    assert count >= 200


def _first_readable(choices: list[Path]) -> Path | None:
    for folder in choices:
        try:
            return read(folder).folder
        except Unreadable:
            continue
    return None


def test_a_known_manifest_hash_is_checked(two: tuple[Path, Path]) -> None:
    with pytest.raises(Unreadable, match="not the one"):
        read(two[1], "0" * 64)


def test_nothing_newer_than_the_pointer_is_ever_read(two: tuple[Path, Path]) -> None:
    older, newer = two
    assert checkpoint.candidates(older, [newer.parent]) == [older]


@pytest.mark.parametrize("at", range(7))
def test_a_full_disk_leaves_the_older_checkpoint_intact(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th fsync fails: that of a file, of the folder, or of its parent folder after the rename."""
    older, _, _ = checkpoint.write(snapshot(7), tmp_path)
    passed: list[int] = []
    real = os.fsync

    def failing(handle: int) -> None:
        if len(passed) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        passed.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(snapshot(14), tmp_path)
    monkeypatch.undo()
    assert read(older).step == 7
    assert not list(tmp_path.glob("tmp-*"))


def test_only_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    writer = Writer(tmp_path, lambda *_: None)
    for step in (5, 10, 15, 20, 25):
        writer.submit(snapshot(step, best=step == 10))
    writer.wait()
    assert {p.name for p in tmp_path.iterdir()} == {"e1-s10", "e1-s20", "e1-s25"}


def test_an_error_of_the_background_writer_is_raised_in_the_training_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = Writer(tmp_path / "file", lambda *_: None)
    writer.submit(snapshot(5))
    with pytest.raises(OSError, match="file"):
        writer.wait()


def test_a_run_falls_back_to_the_older_checkpoint_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 12, checkpoint_every_steps=3)
    whole = runner.train("whole")
    cut = of(runner.train("cut", stop_at=8), "checkpoint")
    assert [e["step"] for e in cut] == [3, 6, 8]
    flip("weights.safetensors", 1)(Path(cut[-1]["path"]), Path())
    events = runner.train("cut", resume_from=cut[-1]["path"], epoch=2)
    assert _resumed(events) == (6, 8)
    assert of(events, "done")[0]["files"] == of(whole, "done")[0]["files"]


def _resumed(events: list[Event]) -> tuple[int, int]:
    resumed_event = of(events, "resumed")[0]
    return resumed_event["step"], resumed_event["from_step"]


def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        "x": torch.randn(3, 5),
        "n": torch.arange(7),
        "b": torch.ones(2, dtype=torch.uint8),
        "s": torch.tensor(2.0),
    }
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], t) for name, t in tensors.items())
