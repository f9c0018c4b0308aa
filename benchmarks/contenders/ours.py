"""Our own contenders: the product's training loop and decoder, one step per turn (turns.py).

.venv/bin/python benchmarks/contenders/ours.py KIND FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from training.engine.memory import configure_allocator  # noqa: E402

configure_allocator()  # before torch, as `python -m training` does

import torch  # noqa: E402

from benchmarks.common import LLAMA_LINEAR, run_file  # noqa: E402
from training.command import train  # noqa: E402
from training.models.generate import GenerateOptions, generate, prompt_ids  # noqa: E402
from training.models.load import load_model  # noqa: E402
from training.plan.run_file import Run  # noqa: E402
from training.text.tokenizer import Tokenizer  # noqa: E402


class Turns:
    """Receives the events of the loop; a turn is `size` optimizer steps."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.seen, self.turn = size, 0, 0

    def emit(self, t: str, **values: Any) -> None:
        if t == "phase" and values["phase"] == "training" and not self.seen:
            turns.begin()
        elif t == "metric" and values["step"] % self.size == 0:
            self.turn += 1
            turns.done(values["tokens"] - self.seen, loss=values["loss"])
            self.seen = values["tokens"]
            turns.begin()


def training(folder: Path, **settings: Any) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        train(Run.parse(run_file(folder, work, **settings)), Turns().emit)


def equal_documents(folder: Path, row: int) -> None:
    """Steps of 4,096 tokens in documents of 64, packed into rows of `row` tokens."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        data = Path(work) / "equal.jsonl"
        data.write_text(1000 * (json.dumps({"text": " ".join(map(str, range(63)))}) + "\n"))
        settings = {"batch_size": 64, "micro_batch_tokens": row}
        train(Run.parse(run_file(folder, work, **settings) | {"train_file": str(data)}), Turns().emit)


def platform(folder: Path, size: int) -> None:
    """The loop, in every other turn with everything that the product adds: events through a pipe and into the spool,
    incoming heartbeats, and a checkpoint in every fifteenth of these turns. All turns do the same work."""
    from training.command import EventWriter

    reader, writer = os.pipe()
    os.dup2(writer, 1)
    _in_background(lambda: [None for _ in iter(lambda: os.read(reader, 1 << 16), b"")])
    heartbeat_reader, heartbeat_writer = os.pipe()
    _in_background(lambda: [None for _ in iter(lambda: os.read(heartbeat_reader, 1 << 16), b"")])

    def send_heartbeats() -> None:
        while True:
            os.write(heartbeat_writer, b'{"lease": "ok"}\n')
            time.sleep(5)

    _in_background(send_heartbeats)
    events, counted = EventWriter(), Turns(size)
    events.spool(Path(tempfile.mkdtemp(dir=folder)))

    def emit(t: str, **values: Any) -> None:
        if counted.turn % 2 == 0:  # checkpoints are written at the beginning of such a turn
            events.emit(t, **values)
        counted.emit(t, **values)

    with tempfile.TemporaryDirectory(dir=folder) as work:
        data = Path(work) / "equal.jsonl"
        data.write_text(400 * (json.dumps({"text": " ".join(map(str, range(113)))}) + "\n"))
        settings = {"batch_size": 2, "max_steps": 100_000, "checkpoint_every_steps": 30 * size}
        train(Run.parse(run_file(folder, work, **settings) | {"train_file": str(data)}), emit)


def _in_background(work: Callable[[], Any]) -> None:
    import threading

    threading.Thread(target=work, daemon=True).start()


def gemm(inputs: int = 768, outputs: int = 3072) -> None:
    """The machine's rate of matrix multiplication, with the shapes of a block's MLP (GPT-2's by default)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, repeats = (2048, 20) if device == "cpu" else (16384, 200)
    a, b = (
        torch.randn(rows, inputs, device=device, dtype=dtype),
        torch.randn(inputs, outputs, device=device, dtype=dtype),
    )
    out = torch.mm(a, b)
    while True:
        turns.begin()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        turns.done(0, flops=2.0 * rows * inputs * outputs * repeats)


def generation(folder: Path) -> None:
    """A prompt of 64 tokens, 48 new ones, greedy, batch size 1."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    decoder = model.decoder()
    prompt = json.loads((folder / "examples.json").read_text())[0][:64]
    options = GenerateOptions(max_tokens=48, ignore_eos=True)
    while True:
        turns.begin()
        [written] = generate(model, tokenizer, prompt, options, decoder=decoder)
        turns.done(48, text=written.ids)


def steps_of(folder: Path, sequences: int) -> None:
    """32 steps of greedy generation with several sequences at once, each after a prompt of 64 tokens."""
    decoder = load_model(folder).decoder()
    prompt = json.loads((folder / "examples.json").read_text())[0][:64]
    while True:
        caches = [decoder.prefill(prompt, 128)[0] for _ in range(sequences)]
        turns.begin()
        ids = [1] * sequences
        for _ in range(32):
            ids = decoder.step(caches, ids).argmax(-1).tolist()
        turns.done(32 * sequences)


def first_token(folder: Path) -> None:
    """The first new token after a prompt of 64 tokens, given as text."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    decoder = model.decoder()
    prompt = (folder / "prompt.txt").read_text()
    while True:
        turns.begin()
        generate(
            model, tokenizer, prompt_ids(prompt, tokenizer), GenerateOptions(max_tokens=1), decoder=decoder
        )
        turns.done(1)


KINDS: dict[str, Callable[[Path], None]] = {
    "full": lambda folder: training(folder),
    "full-dropout": lambda folder: training(folder, dropout=0.1),
    "lora": lambda folder: training(folder, method="lora"),
    "lora-linear": lambda folder: training(folder, method="lora", lora_targets=LLAMA_LINEAR),
    "rows-512": lambda folder: equal_documents(folder, 512),
    "rows-4096": lambda folder: equal_documents(folder, 4096),
    "platform": lambda folder: platform(folder, size=20),
    "gemm": lambda folder: gemm(),
    "gemm-llama": lambda folder: gemm(576, 1536),
    "generate": generation,
    "steps-1": lambda folder: steps_of(folder, 1),
    "steps-8": lambda folder: steps_of(folder, 8),
    "first-token": first_token,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
