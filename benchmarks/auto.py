"""`bin/bench auto`: automatic settings against the defaults of AutoTrain, LLaMA-Factory, H2O LLM Studio and TRL.

    bin/bench auto [--only WORD …] [--seed N]

Six tasks (benchmarks/tasks.py), models of different sizes, everything trained in our loop; the figure is the loss on test
rows that were used neither for training nor for choosing weights. Compared with each peer, our run gets at most the same
compute: its epochs are set so that training takes no more operations than the peer's (a token costs LoRA two thirds), and
everything else is automatic; the rows that we hold out for validation come out of our budget. `as-it-is` leaves the epochs
automatic too and is compared with the best of the peers; the note before it shows how much compute it used.

`lora-full` and `lora-attention` compare LoRA's defaults, in as many steps, with full fine-tuning (at most 5 % more loss) and
with adapters of query and value only. `--only /lora` runs nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import tasks
from benchmarks.common import ROOT, Scores
from training.plan.catalog import STARTER_FOLDER, describe

CACHE = ROOT / ".bench" / "small-1"  # the smaller model, trained once
SMOLLM2 = ROOT / ".tools" / "smollm2"
LORA_TASKS = ("chat", "extraction", "style")  # with answers of more than a word
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Peer:
    """A peer's defaults as our settings. `dropout` None means that of the model's configuration, as the peer does it."""

    epochs: float
    settings: dict[str, Any]
    dropout: float | None = None


FULL = {"method": "full", "weight_decay": 0.0, "clip_norm": 1.0}
PEERS = {
    # huggingface/autotrain-advanced@0803634 src/autotrain/trainers/clm/params.py:32-40, :49 (peft off). It trains on
    # prompts too; here it trains on answers only, which can only help it.
    "autotrain": Peer(
        1, FULL | {"learning_rate": 3e-5, "batch_size": 8, "warmup": 0.1, "schedule": "linear"}
    ),
    # hiyouga/LLaMA-Factory@13d252f examples/train_lora/llama3_lora_sft.yaml:8-10, :28-33; alpha = 2 × rank and no
    # dropout by src/llamafactory/hparams/finetuning_args.py (LoraArguments).
    "llama-factory": Peer(
        3,
        {
            "method": "lora",
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_targets": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "learning_rate": 1e-4,
            "batch_size": 8,
            "warmup": 0.1,
            "schedule": "cosine",
        },
    ),
    # h2oai/h2o-llmstudio@017e2ad llm_studio/python_configs/text_causal_language_modeling_config.py,
    # ConfigNLPCausalLMTraining; no clipping; intermediate_dropout 0; empty lora_target_modules = all linear layers.
    "h2o": Peer(
        1,
        {
            "method": "lora",
            "lora_rank": 4,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "lora_targets": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "learning_rate": 1e-4,
            "batch_size": 2,
            "warmup": 0.0,
            "schedule": "cosine",
        },
        dropout=0.0,
    ),
    # huggingface/trl@016013e trl/trainer/sft_config.py (learning_rate), the rest by transformers 5.23
    # training_args.py:777-866.
    "trl": Peer(3, FULL | {"learning_rate": 2e-5, "batch_size": 8, "warmup": 0.0, "schedule": "linear"}),
}


# --- models ------------------------------------------------------------------------------------------


def small() -> Path:
    """A GPT-2 with 0.97 million parameters and the starter's tokenizer, trained on text that the starter generated."""
    import torch

    from training.models.architecture import gpt2_config
    from training.models.generate import GenerateOptions, generate
    from training.models.load import load_model
    from training.models.transformer import Transformer
    from training.text.tokenizer import Tokenizer

    if (CACHE / "model.safetensors").exists():
        return CACHE
    teacher, tokenizer = load_model(STARTER_FOLDER).eval(), Tokenizer.load(STARTER_FOLDER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = GenerateOptions(max_tokens=160, temperature=0.9, seed=1, n=40, ignore_eos=True)
        beginnings = ("A ", "The ", "To ", "Something ", "In ", "One ")
        texts = [
            w.text for b in beginnings for w in generate(teacher, tokenizer, tokenizer.encode(b), options)
        ]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = json.loads((STARTER_FOLDER / "config.json").read_text())
        torch.manual_seed(1)
        fresh = gpt2_config(
            vocab_size=config["vocab_size"],
            n_positions=512,
            n_embd=128,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        Transformer.new(fresh).save(folder / "base")
        for file in TOKENIZER_FILES:
            shutil.copy(STARTER_FOLDER / file, folder / "base" / file)
        settings = {
            "learning_rate": 3e-3,
            "epochs": 8,
            "batch_size": 8,
            "validation_fraction": 0.05,
            "dropout": 0,
        }
        train_once(folder / "base", folder / "text.jsonl", settings, folder / "work")
        shutil.copytree(folder / "work" / "final", CACHE, dirs_exist_ok=True)
    return CACHE


def models(scores: Scores) -> dict[str, Path]:
    from training.plan import hub
    from training.plan.events import Failure

    folders = {"small": small(), "starter": STARTER_FOLDER}
    try:
        folders["gpt2"] = hub.locate("gpt2")
    except Failure as failure:
        scores.note(f"gpt2 is skipped: {failure.message}")
    return folders


# --- one run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    loss: float  # on the test rows
    operations: float  # floating-point operations of training and of validation
    settings: dict[str, Any]
    seconds: float


def train_once(base: Path, data: Path, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Trains with our loop. Returns the plan event."""
    from training.command import train
    from training.plan.run_file import Run

    emitted: dict[str, dict[str, Any]] = {}
    quiet = {"checkpoint_every_s": 0, "precision": "fp32"}
    run = {
        "base": str(base),
        "train_file": str(data),
        "work_dir": str(work),
        "settings": quiet | settings,
        "rehearse": False,
        "prompts": ["The"],
    }
    train(Run.parse(run), lambda kind, **line: emitted.update({kind: line}))
    return emitted["plan"]


def run(base: Path, data: Path, test: Path, settings: dict[str, Any]) -> Trained:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        plan = train_once(base, data, settings, Path(work))
        loss = test_loss(Path(work) / "final", test)
    used, tokens = plan["settings"], plan["tokens"]
    passes = passes_of(used["method"])
    # an evaluation is a forward pass, a third of a full step; there is one before training and one after each epoch
    held = (
        tokens * plan["held_out"] / plan["examples"] * (2 + int(used["epochs"])) * 2
        if plan["held_out"]
        else 0
    )
    return Trained(loss, passes * tokens * used["epochs"] + held, used, time.perf_counter() - started)


def passes_of(method: str) -> int:
    """Operations per weight and token: LoRA computes no gradients of the frozen weights."""
    return 6 if method == "full" else 4


def test_loss(folder: Path, test: Path) -> float:
    import torch

    from training.engine.evaluate import evaluate
    from training.engine.packing import Examples
    from training.models.load import load_model
    from training.text.encode import EncodingOptions, examples
    from training.text.tokenizer import Tokenizer

    test_examples = Examples.of(
        examples(test, Tokenizer.load(folder), EncodingOptions(describe(folder).context))
    )
    return evaluate(load_model(folder), test_examples, 4096, torch.device("cpu")).loss


# --- the table ---------------------------------------------------------------------------------------


def compare(scores: Scores, size: str, base: Path, task: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, test = tasks.lay_out(task, Path(folder), seed)
        ours = cache(lambda epochs: run(base, data, test, {"epochs": epochs}))
        before, theirs = test_loss(base, test), {}
        for name, peer in PEERS.items():
            theirs[name] = run(base, data, test, _run_settings(peer, base))
            mine = ours(_affordable_epochs(peer))
            assert mine.operations <= theirs[name].operations, "our run had more compute"
            scores.add(f"{size}/{task}/{name}", mine.loss, theirs[name].loss, 1.0, less_is_better=True)
        best = min(theirs, key=lambda name: theirs[name].loss)
        alone = ours(None)
        much = alone.operations / theirs[best].operations
        scores.note(
            f"{size}/{task}: untrained {before:.3f}; automatic {alone.settings['epochs']:g} epochs of {alone.settings['batch_size']} at "
            f"{alone.settings['learning_rate']:g}, {much:.1f} × the compute of {best}, {alone.seconds:.0f} s"
        )
        scores.add(f"{size}/{task}/as-it-is", alone.loss, theirs[best].loss, 1.0, less_is_better=True)


def compare_lora(scores: Scores, size: str, base: Path, task: str, seed: int) -> None:
    """LoRA with its defaults against full fine-tuning and against query and value only, in as many steps."""
    with tempfile.TemporaryDirectory() as folder:
        data, test = tasks.lay_out(task, Path(folder), seed)
        full = run(base, data, test, {"adapter": "none"})
        same = {"adapter": "lora", "epochs": full.settings["epochs"]}
        lora = run(base, data, test, same)
        attention = run(base, data, test, same | {"lora_targets": ["attention"]})
        scores.note(
            f"{size}/{task}: {full.settings['epochs']:g} epochs of {full.settings['batch_size']}; learning rates "
            f"{full.settings['learning_rate']:g} full, {lora.settings['learning_rate']:g} LoRA; "
            f"{full.seconds:.0f}, {lora.seconds:.0f} and {attention.seconds:.0f} s"
        )
        scores.add(f"{size}/{task}/lora-full", lora.loss, full.loss, 0.95, less_is_better=True)
        scores.add(f"{size}/{task}/lora-attention", lora.loss, attention.loss, 1.0, less_is_better=True)


def _run_settings(peer: Peer, base: Path) -> dict[str, Any]:
    config = json.loads((base / "config.json").read_text())
    dropout = float(config.get("resid_pdrop", 0.1)) if peer.dropout is None else peer.dropout
    return peer.settings | {
        "epochs": peer.epochs,
        "dropout": dropout,
        "validation_fraction": 0,
        "keep_best": False,
    }


def _affordable_epochs(peer: Peer) -> float:
    """Epochs of our run, which trains all weights, that cost no more than the peer's run."""
    return round(peer.epochs * passes_of(peer.settings["method"]) / passes_of("full") - 0.005, 2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench auto")
    parser.add_argument("--only", action="append", help="only comparisons whose size/task contains this")
    parser.add_argument("--seed", type=int, default=1, help="seed of the tasks")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    scores = Scores()
    scores.note("test loss; columns: ours, theirs, ratio, goal")
    for size, base in models(scores).items():
        for task in tasks.TASKS:
            if not args.only or any(word in f"{size}/{task}" for word in args.only):
                compare(scores, size, base, task, args.seed)
    for size, base in {"starter": STARTER_FOLDER, "smollm2": SMOLLM2}.items():
        if not base.exists():
            scores.note(f"{size} is skipped: there is no {base}")
            continue
        for task in LORA_TASKS:
            if not args.only or any(word in f"{size}/{task}/lora" for word in args.only):
                compare_lora(scores, size, base, task, args.seed)
    return scores.end()


if __name__ == "__main__":
    sys.exit(main())
