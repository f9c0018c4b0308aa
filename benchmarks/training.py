"""`bin/bench training`: ours against Hugging Face Trainer, TRL, a nanoGPT loop, peft and transformers' generate.

    bin/bench training [--quick] [--clock wall|cpu] [--threads N] [--only NAME …]

Same weights (GPT-2 124M, random), same 400 examples in the same order (log-normal lengths, median 90, at most 512
tokens), same hyperparameters, fp32 on a CPU and bf16 on a GPU. Our trainer and a peer run at the same time and take turns
step by step, so that other load affects both; figures are over all steps after the first. `--clock cpu` measures CPU time
instead, for a machine with other load. `--quick` uses a small model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from benchmarks.common import ROOT, Contender, Scores, in_turns, run_file
from training.plan.catalog import STARTER_FOLDER

PEERS = ROOT / ".bench" / "bin" / "python"
HERE = ROOT / "benchmarks" / "contenders"
VOCABULARY = 50257
SPEED = [  # name, our kind, the peer's kind, goal
    ("trainer-dynamic-padding", "full", "trainer", 2.7),
    ("nanogpt-packed", "full", "nanogpt", 1.15),
    ("trl-packing", "full", "trl-packing", 1.4),
    ("lora-peft-trainer", "lora", "trainer-lora", 2.2),
    ("trl-no-packing", "full", "trl", 3.0),
    ("trainer-dynamic-dropout", "full-dropout", "trainer-dropout", 2.7),
    ("trainer-padded-512", "full", "trainer-padded", 5.5),
]
MEMORY = {"trainer-dynamic-padding": 1 / 0.6, "lora-peft-trainer": 1 / 0.5}


@dataclass
class Bench:
    folder: Path
    clock: str
    threads: int
    rounds: int
    shape: dict[str, int]
    scores: Scores

    def start(self, kind: str, *, peer: bool = False) -> Contender:
        python, script = (PEERS, "peers.py") if peer else (Path(sys.executable), "ours.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        return Contender(kind, [str(python), str(HERE / script), kind, str(self.folder)], environment)

    def race(self, ours: str, theirs: str, rounds: int | None = None) -> tuple[Contender, Contender]:
        pair = self.start(ours), self.start(theirs, peer=True)
        for contender in pair:
            contender.wait_ready()
        in_turns(pair, 1 + (rounds or self.rounds))
        return pair


# --- the same work for all ---------------------------------------------------------------------------


def lay_out(folder: Path, shape: dict[str, int], examples: int = 400) -> None:
    """Writes a random GPT-2, a tokenizer whose words are numbers, and the examples: as text for our trainer, and as token
    ids in our training order for the peers."""
    from training.engine import inputs
    from training.engine.packing import example_at
    from training.models.architecture import gpt2_config
    from training.models.transformer import Transformer
    from training.plan.run_file import Run

    Transformer.new(
        gpt2_config(
            vocab_size=VOCABULARY,
            n_positions=1024,
            bos_token_id=50256,
            eos_token_id=50256,
            **shape,
        )
    ).save(folder)
    words = {str(i): i for i in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))  # noqa: S106  a token of text
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(90), 0.7, examples)).astype(int), 8, 512)
    rows = [{"text": " ".join(map(str, rng.integers(0, VOCABULARY - 1, n - 1)))} for n in lengths]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"sequence_length": 512, "validation_fraction": 0, "train_on": "all", "max_steps": 10}
    run = {
        "base": str(folder),
        "train_file": str(folder / "examples.jsonl"),
        "work_dir": str(folder / "work"),
        "settings": settings,
    }
    examples_read = inputs.read(Run.parse(run)).train
    order = [example_at(at, 0, len(examples_read)) for at in range(len(examples_read))]
    (folder / "examples.json").write_text(json.dumps([examples_read[i][0].tolist() for i in order]))


# --- what is measured --------------------------------------------------------------------------------


def speed_and_memory(bench: Bench, name: str, ours: str, theirs: str, goal: float) -> None:
    mine, peer = bench.race(ours, theirs)
    bench.scores.add(f"speed/{name}", mine.rate(bench.clock), peer.rate(bench.clock), goal)
    peaks = mine.end() / 2**30, peer.end() / 2**30
    if name in MEMORY:
        bench.scores.add(f"memory/{name}", *peaks, MEMORY[name], less_is_better=True)
    # these train on the same batches, so equal losses show that the same work was done
    if theirs in (
        "trainer",
        "trainer-lora",
        "trainer-padded",
        "trl",
    ):
        difference = max(
            abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(mine.steps, peer.steps, strict=True)
        )
        bench.scores.note(f"{name}: losses of the same steps differ by at most {difference:.1e}")


def gemm_share(bench: Bench) -> None:
    """Useful floating-point operations per second of our steps, relative to plain matrix multiplication on this machine."""
    lengths = [len(ids) for ids in json.loads((bench.folder / "examples.json").read_text())]
    pair = bench.start("full"), bench.start("gemm")
    for contender in pair:
        contender.wait_ready()
    in_turns(pair, 1 + bench.rounds)
    layers, width = bench.shape["n_layer"], bench.shape["n_embd"]
    measured = lengths[8 : 8 * (1 + bench.rounds)]
    flops = sum(
        6 * 12 * layers * width**2 * n + 6 * layers * width * n * (n + 1) + 6 * VOCABULARY * width * (n - 1)
        for n in measured
    )
    ours, machine = (c.steps[1:] for c in pair)
    rate = flops / sum(step[bench.clock] for step in ours)
    gemm = statistics.median(step["flops"] / step[bench.clock] for step in machine)
    bench.scores.add("share-of-gemm-rate (GFLOP/s)", rate / 1e9, gemm / 1e9, 0.78)
    for contender in pair:
        contender.end()


def generation(bench: Bench) -> None:
    mine, peer = bench.race("generate", "generate", 3)
    bench.scores.add("generation (tokens/s)", mine.rate(bench.clock), peer.rate(bench.clock), 1.1)
    same = mine.steps[0]["text"] == peer.steps[0]["text"]
    bench.scores.note(
        f"generation: {'the same tokens' if same else 'different tokens where two are equally likely'}"
    )
    mine.end()
    peer.end()


def start_up(bench: Bench, name: str, folder: Path) -> None:
    """From the start to the end of the first step, minus a steady step: cold, and from a prewarmed trainer."""
    with tempfile.TemporaryDirectory() as work:
        # The same example in every step, so that the first step is as long as any other.
        row = json.dumps({"text": " ".join(map(str, range(63)))}) + "\n"
        data, path = Path(work) / "equal.jsonl", Path(work) / "run.json"
        data.write_text(400 * row)
        path.write_text(json.dumps(run_file(folder, work, batch_size=1) | {"train_file": str(data)}))
        for how, limit in (("cold", 3.0), ("prewarmed", 0.3)):
            durations = [_first_step(bench, path, prewarmed=how == "prewarmed") for _ in range(3)]
            bench.scores.add(
                f"start-{how}/{name} (s)", statistics.median(durations), limit, 1.0, less_is_better=True
            )


def _first_step(bench: Bench, path: Path, *, prewarmed: bool) -> float:
    base = json.loads(path.read_text())["base"]  # a worker prewarms with the base model of the previous job
    command = ["standby", "--base", base] if prewarmed else ["train", str(path)]
    argv = [sys.executable, "-m", "training", *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads)}
    started = time.perf_counter() if bench.clock == "wall" else 0.0
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    now = time.perf_counter if bench.clock == "wall" else partial(_cpu_seconds, process.pid)
    assert process.stdin
    assert process.stdout
    if prewarmed:
        assert json.loads(process.stdout.readline())["t"] == "ready"
        time.sleep(3)  # as between two jobs of a worker
        started = now()
        process.stdin.write(json.dumps({"config": str(path)}).encode() + b"\n")
        process.stdin.flush()
    ends: list[float] = []
    while len(ends) < 6:
        if json.loads(process.stdout.readline())["t"] == "metric":
            ends.append(now())
    process.kill()
    process.wait()
    steady = statistics.median(b - a for a, b in itertools.pairwise(ends))
    return ends[0] - started - steady


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def packed_gradients(bench: Bench) -> None:
    """Loss and all gradients of one packed row, compared with each example alone through transformers' eager GPT-2."""
    import torch
    import transformers

    from training.engine.evaluate import batch_loss
    from training.models.batch import pack
    from training.models.kernels import main_grad
    from training.models.transformer import Transformer

    model = Transformer.load(bench.folder).eval()
    lm: Any = transformers.GPT2LMHeadModel.from_pretrained(
        bench.folder, attn_implementation="eager", dtype=torch.float32
    )
    lm.eval()
    documents = [ids[:96] for ids in json.loads((bench.folder / "examples.json").read_text())[:5]]
    for kind, first in (("full", 1), ("completion-only", 3)):
        masks = [
            np.array([int(i >= first if kind == "full" else i % 7 >= first) for i in range(len(d))])
            for d in documents
        ]
        row = pack([(np.array(d), m) for d, m in zip(documents, masks, strict=True)])
        for p in model.parameters():
            main_grad(p).zero_()
        ours, _ = batch_loss(model, row, 1 / len(row.loss_positions))
        ours.backward()
        lm.zero_grad()
        theirs = 0.0
        for ids, mask in zip(documents, masks, strict=True):
            labels = torch.tensor([i if m else -100 for i, m in zip(ids, mask, strict=True)])
            logits = lm(torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / len(
                row.loss_positions
            )
            loss.backward()
            theirs += float(loss.detach())
        grads = dict(lm.named_parameters())
        worst = abs(float(ours.detach()) - theirs) / theirs
        for name, p in model.named_parameters():
            mine, other = main_grad(p), grads[name].grad
            # the keys' bias has only rounding errors for a gradient: softmax does not depend on it
            if name.endswith("c_attn.bias"):
                width = len(other) // 3
                mine, other = (torch.cat([g[:width], g[2 * width :]]) for g in (mine, other))
            worst = max(worst, float((mine - other).norm() / other.norm()))
        bench.scores.add(f"packed-gradient-error/{kind}", worst, 1e-5, 1.0, less_is_better=True)


def platform_overhead(bench: Bench, pairs: int) -> None:
    """Events, spool and heartbeats in every step and a checkpoint per minute, compared with the plain loop: alternating in
    one process (two processes doing the same differ by 2 %), about four seconds each, three minutes of both."""
    platform = bench.start("platform")
    platform.wait_ready()
    in_turns([platform], 2 + 2 * pairs)
    durations = [step[bench.clock] for step in platform.steps[2:]]
    full, plain = durations[::2], durations[1::2]
    typical = statistics.median(f / b for b, f in zip(plain, full, strict=True))
    bench.scores.note(
        f"platform: {sum(plain):.0f} s plain, {sum(full):.0f} s with everything; median of the turns {typical - 1:+.2%}"
    )
    overhead = sum(full) / sum(plain) - 1
    bench.scores.add("platform-overhead", max(overhead, 1e-4), 0.02, 1.0, less_is_better=True)
    platform.end()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench training")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small model (4 layers of 256) and fewer rounds, for a rough impression",
    )
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, help="measured steps per contender")
    parser.add_argument("--only", action="append", help="only parts whose name contains this")
    args = parser.parse_args()
    shape = (
        {"n_layer": 4, "n_embd": 256, "n_head": 4}
        if args.quick
        else {"n_layer": 12, "n_embd": 768, "n_head": 12}
    )
    scores = Scores()
    scores.note(
        f"GPT-2 {shape}, {args.threads} threads, {args.clock} clock; tokens/s and GiB; columns: ours, theirs, ratio, goal"
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, small = Path(name) / "model", Path(name) / "small"
        lay_out(folder, shape)
        lay_out(small, {"n_layer": 4, "n_embd": 256, "n_head": 4})
        bench = Bench(folder, args.clock, args.threads, args.rounds or 4, shape, scores)
        small_bench = Bench(small, args.clock, args.threads, 4, shape, scores)
        parts: list[tuple[str, Any]] = [
            ("generation", lambda: generation(bench)),
            ("share-of-gemm-rate", lambda: gemm_share(bench)),
            ("packed-gradient-error", lambda: packed_gradients(bench)),
            ("start starter", lambda: start_up(bench, "starter", STARTER_FOLDER)),
            ("start gpt2", lambda: start_up(bench, "gpt2", folder)),
            *((f"speed memory {row[0]}", partial(speed_and_memory, bench, *row)) for row in SPEED),
            ("platform-overhead", lambda: platform_overhead(small_bench, 5 if args.quick else 45)),
        ]
        for part, measure in parts:
            if args.only and not any(word in part for word in args.only):
                continue
            try:
                measure()
            except RuntimeError as error:  # a contender died; measure the others all the same
                scores.fail(part, str(error))
    return scores.end()


if __name__ == "__main__":
    sys.exit(main())
