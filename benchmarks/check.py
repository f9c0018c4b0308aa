"""`bin/bench check`: how fast an upload is checked, and how much memory that takes.

    bin/bench check [--gigabytes 1] [--only read|tokenize]

read: `python -m training check` without a tokenizer. tokenize: the same with the starter model's tokenizer, on a tenth of
the size, compared with plain `encode_batch_fast` over the same pieces of text. Memory is the sum over all processes;
"memory grown" is the difference between the whole file and a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

BATCH_ROWS = 512
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Scores  # noqa: E402
from training.data.formats import rows  # noqa: E402
from training.plan.catalog import SAMPLE_FOLDER, STARTER_FOLDER  # noqa: E402
from training.text.encode import pieces  # noqa: E402
from training.text.tokenizer import Tokenizer  # noqa: E402


def write_chats(path: Path, size: int) -> None:
    """Writes conversations of about 700 bytes each, all different."""
    words = sorted(set(re.findall(r"[a-z]{3,}", (SAMPLE_FOLDER / "train.jsonl").read_text())))
    rng = random.Random(1)  # noqa: S311  not for secrets

    def filler(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(8, most))).capitalize() + "."

    block = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"%d: {filler(60)}"},
                    {"role": "assistant", "content": filler(120)},
                ]
            }
        )
        for _ in range(5000)
    ]
    with path.open("w") as file:
        number = 0
        while file.tell() < size:
            file.writelines(f"{row % (number + i)}\n" for i, row in enumerate(block))
            number += len(block)


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            pids += tree(int(child))
    return pids


def resident(pid: int) -> int:
    """Resident bytes of a process tree now. Shared memory is counted once per process."""
    total = 0
    for each in tree(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    return total


def check(path: Path, *options: str) -> tuple[float, int, dict[str, Any]]:
    """Runs the check. Returns (seconds, peak bytes, report)."""
    command = [sys.executable, "-m", "training", "check", str(path), *options]
    peak, started = 0, time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        printed: list[str] = []
        assert process.stdout
        reader = threading.Thread(target=lambda: printed.extend(process.stdout or ()))
        reader.start()
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.2)
        reader.join()
    report = json.loads(printed[-1])
    assert report["ready"], report["verdict"]
    return time.perf_counter() - started, peak, report


def read(scores: Scores, path: Path, tenth: Path) -> None:
    _, small, _ = check(tenth)
    seconds, peak, report = check(path)
    size = path.stat().st_size
    scores.note(
        f"read: {size / 1e9:.2f} GB, {report['rows']:,} rows in {seconds:.1f} s, peak {peak / 2**20:.0f} MB"
    )
    scores.add("check without tokenizing, MB/s", size / 1e6 / seconds, 25, 1.0)
    # fingerprints of all rows, and those being passed from one process to the other
    kept = 3 * 16 * report["rows"] * 2 + (64 << 20)
    scores.add("memory grown, MB", max(1.0, (peak - small) / 2**20), kept / 2**20, 1.0, less_is_better=True)


def tokenize(scores: Scores, tenth: Path) -> None:
    """In turns, and the median round counts: the speed of a machine may drift by a tenth within a minute."""
    tokenizer = Tokenizer.load(STARTER_FOLDER)
    megabytes = tenth.stat().st_size / 1e6
    rounds = []
    for _ in range(5):
        plain = plain_seconds(tenth, tokenizer)
        seconds, peak, report = check(tenth, "--tokenizer", str(STARTER_FOLDER))
        rounds.append((plain / seconds, seconds, plain))
        scores.note(
            f"tokenize: {report['tokens']:,} tokens in {seconds:.1f} s, plain {plain:.1f} s, peak {peak / 2**20:.0f} MB"
        )
    _, seconds, plain = sorted(rounds)[len(rounds) // 2]
    scores.add("check with tokenizing, MB/s", megabytes / seconds, megabytes / plain, 0.8)


def plain_seconds(path: Path, tokenizer: Tokenizer) -> float:
    """Time of `encode_batch_fast` alone, in large batches. Reading and splitting the rows is not counted."""
    seconds, read = 0.0, rows(path)
    while batch := list(islice(read, BATCH_ROWS)):
        texts = [piece.text for row in batch for parts in pieces(row, tokenizer) for piece in parts]
        started = time.perf_counter()
        tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - started
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench check")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--only", choices=("read", "tokenize"))
    options = parser.parse_args()
    scores = Scores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path, tenth = Path(name) / "chats.jsonl", Path(name) / "tenth.jsonl"
        write_chats(path, int(options.gigabytes * 1e9))
        write_chats(tenth, int(options.gigabytes * 1e8))
        if options.only in (None, "read"):
            read(scores, path, tenth)
        if options.only in (None, "tokenize"):
            tokenize(scores, tenth)
    return scores.end()


if __name__ == "__main__":
    sys.exit(main())
