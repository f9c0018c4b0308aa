"""`bin/bench training`: ours against Hugging Face Trainer, TRL, a nanoGPT loop, peft and transformers' generate.

    bin/bench training [--family gpt2|llama] [--quick] [--clock wall|cpu] [--threads N] [--only NAME …]

Same weights (GPT-2 124M or SmolLM2-135M's shape, random), same 400 examples in the same order (log-normal lengths, median 90, at most 512
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
LLAMA_SPEED = [  # SmolLM2-135M's shape; LoRA in all linear layers
    ("llama-trl-no-packing", "full", "trl", 1.6),
    ("llama-trl-packing", "full", "trl-packing", 1.2),
    ("llama-lora-trl-no-packing", "lora-linear", "trl-lora", 1.6),
    ("llama-lora-trl-packing", "lora-linear", "trl-packing-lora", 1.2),
]
MEMORY = {
    "llama-trl-no-packing": 1 / 0.6,
    "llama-lora-trl-no-packing": 1 / 0.5,
    "trainer-dynamic-padding": 1 / 0.6,
    "lora-peft-trainer": 1 / 0.5,
}


@dataclass
class Bench:
    folder: Path
    clock: str
    threads: int
    rounds: int
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


def gpt2(shape: dict[str, int]) -> dict[str, Any]:
    from training.models.architecture import gpt2_config

    return gpt2_config(bos_token_id=50256, eos_token_id=50256, **shape)


def llama(layers: int) -> dict[str, Any]:
    """config.json of a model with SmolLM2-135M's shape, which has 30 layers."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


# --- the same work for all ---------------------------------------------------------------------------


def lay_out(folder: Path, config: dict[str, Any], examples: int = 400) -> None:
    """Writes a model with random weights, a tokenizer whose words are numbers, and the examples: as text for our trainer, and as token
    ids in our training order for the peers."""
    from training.engine import inputs
    from training.engine.packing import example_at
    from training.models.transformer import Transformer
    from training.plan.run_file import Run

    Transformer.new(config).save(folder)
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
        "trl-lora",
    ):
        difference = max(
            abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(mine.steps, peer.steps, strict=True)
        )
        bench.scores.note(f"{name}: losses of the same steps differ by at most {difference:.1e}")


def gemm_share(bench: Bench, name: str, ours: str, machine: str, goal: float) -> None:
    """Useful floating-point operations per second of our steps (engine/device.py's formula: the head on trained tokens
    only, and adapters not counted), relative to plain matrix multiplication on this machine."""
    from training.engine.device import flop_counter
    from training.models.load import load_model

    lengths = [len(ids) for ids in json.loads((bench.folder / "examples.json").read_text())]
    count = flop_counter(load_model(bench.folder), lora="lora" in ours)
    pair = bench.start(ours), bench.start(machine)
    for contender in pair:
        contender.wait_ready()
    in_turns(pair, 1 + bench.rounds)
    measured = lengths[8 : 8 * (1 + bench.rounds)]
    flops = count(measured, sum(measured) - len(measured))
    steps, products = (c.steps[1:] for c in pair)
    rate = flops / sum(step[bench.clock] for step in steps)
    gemm = statistics.median(step["flops"] / step[bench.clock] for step in products)
    bench.scores.add(f"{name} (GFLOP/s)", rate / 1e9, gemm / 1e9, goal)
    for contender in pair:
        contender.end()


def long_rows(bench: Bench) -> None:
    """What a token costs in rows of 4,096, relative to rows of 512, with documents of 64 tokens."""
    pair = bench.start("rows-512"), bench.start("rows-4096")
    for contender in pair:
        contender.wait_ready()
    in_turns(pair, 1 + bench.rounds)
    short, long = (1000 / contender.rate(bench.clock) for contender in pair)
    bench.scores.add("row-of-4096 (ms per token)", long, short, 1 / 1.1, less_is_better=True)
    for contender in pair:
        contender.end()


def many_sequences(bench: Bench) -> None:
    """Tokens per second of eight sequences at once, relative to one."""
    pair = bench.start("steps-8"), bench.start("steps-1")
    for contender in pair:
        contender.wait_ready()
    in_turns(pair, 4)
    rates = [contender.rate(bench.clock) for contender in pair]
    bench.scores.add("generation-of-8 (tokens/s)", rates[0], rates[1], 4.0)
    for contender in pair:
        contender.end()


def generation(bench: Bench, goal: float) -> None:
    mine, peer = bench.race("generate", "generate", 3)
    bench.scores.add("generation (tokens/s)", mine.rate(bench.clock), peer.rate(bench.clock), goal)
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


Parts = list[tuple[str, Any]]


def gpt2_parts(args: argparse.Namespace, work: Path, scores: Scores) -> Parts:
    tiny = {"n_layer": 4, "n_embd": 256, "n_head": 4}
    shape = tiny if args.quick else {"n_layer": 12, "n_embd": 768, "n_head": 12}
    folder, small = work / "model", work / "small"
    lay_out(folder, gpt2(shape))
    lay_out(small, gpt2(tiny))
    scores.note(
        f"GPT-2 {shape}, {args.threads} threads, {args.clock} clock; tokens/s and GiB; columns: ours, theirs, ratio, goal"
    )
    bench = Bench(folder, args.clock, args.threads, args.rounds or 4, scores)
    small_bench = Bench(small, args.clock, args.threads, 4, scores)
    return [
        ("generation", lambda: generation(bench, 1.1)),
        ("share-of-gemm-rate", lambda: gemm_share(bench, "share-of-gemm-rate", "full", "gemm", 0.78)),
        ("packed-gradient-error", lambda: packed_gradients(bench)),
        ("start starter", lambda: start_up(bench, "starter", STARTER_FOLDER)),
        ("start gpt2", lambda: start_up(bench, "gpt2", folder)),
        *((f"speed memory {row[0]}", partial(speed_and_memory, bench, *row)) for row in SPEED),
        ("platform-overhead", lambda: platform_overhead(small_bench, 5 if args.quick else 45)),
    ]


def llama_parts(args: argparse.Namespace, work: Path, scores: Scores) -> Parts:
    layers = 4 if args.quick else 30
    lay_out(work / "model", llama(layers))
    scores.note(
        f"Llama with SmolLM2-135M's shape, {layers} layers, {args.threads} threads, {args.clock} clock; tokens/s and GiB; "
        "columns: ours, theirs, ratio, goal"
    )
    bench = Bench(work / "model", args.clock, args.threads, args.rounds or 4, scores)
    share = partial(gemm_share, bench)
    return [
        ("generation", lambda: generation(bench, 1.3)),
        ("generation-of-8", lambda: many_sequences(bench)),
        ("share-of-gemm-rate", lambda: share("share-of-gemm-rate", "full", "gemm-llama", 0.80)),
        ("lora-share", lambda: share("lora-share-of-gemm-rate", "lora-linear", "gemm-llama", 0.75)),
        ("long-rows", lambda: long_rows(bench)),
        *((f"speed memory {row[0]}", partial(speed_and_memory, bench, *row)) for row in LLAMA_SPEED),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench training")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small model (4 layers of 256) and fewer rounds, for a rough impression",
    )
    parser.add_argument("--family", default="gpt2", choices=["gpt2", "llama"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, help="measured steps per contender")
    parser.add_argument("--only", action="append", help="only parts whose name contains this")
    args = parser.parse_args()
    scores = Scores()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        parts = (llama_parts if args.family == "llama" else gpt2_parts)(args, Path(name), scores)
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
