"""Tiny models whose answers end in six ways, trained until they know their rows."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from tests.training.tiny import END, backend
from training.command import train
from training.models.architecture import gpt2_config
from training.models.transformer import Transformer
from training.plan.run_file import Run

WORDS = ["the cat", "a moon", "the mat and the cat", "café", "looked"]
PROMPTS = [f"{subject} {n}?" for n in range(4) for subject in ("cat", "mat", "moon", "the", "on")]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(end: str, last: str | None = None) -> str:
    """A template whose answers end with `end`, the very last one with `last`."""
    closing = f"{{{{ {(last or end)!r} if loop.last else {end!r} }}}}" if last else end
    return (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{{ '\\nA:' }}"
        f"{{% else %}}{{{{ ' ' + m.content }}}}{closing}{{% endif %}}{{% endfor %}}"
    )


@dataclass(frozen=True)
class Case:
    template: str
    tokens: tuple[str, ...] = ()  # control tokens beside the end token
    generation_config: tuple[str, ...] = (END,)
    ends: tuple[str, ...] = (END,)  # what the exported generation_config must hold
    shown_by_transformers: str = ""  # a plain-text end is part of what transformers returns


CASES = {
    "eos": Case(turns("{{ eos_token }}")),
    "another control token": Case(CHATML, ("<|im_start|>", "<|im_end|>"), ends=(END, "<|im_end|>")),
    "another control token of generation_config": Case(
        CHATML, ("<|im_start|>", "<|im_end|>"), (END, "<|im_end|>"), (END, "<|im_end|>")
    ),
    "two ends": Case(turns("<|eot|>", "<|eot|>" + END), ("<|eot|>",), ends=(END, "<|eot|>")),
    "no end": Case(turns("{{ '\\n' }}")),
    "a plain-text end": Case(turns("{{ '\\n### End\\n' }}"), shown_by_transformers="\n### End"),
}


def write_base(folder: Path, case: Case) -> Path:
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer.from_str(backend())
    tokenizer.add_special_tokens(list(case.tokens))
    config = gpt2_config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=96, n_embd=48, n_layer=2, n_head=2
    )
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    Transformer.new(config, 1).save(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": case.template}))
    ids = [tokenizer.token_to_id(token) for token in case.generation_config]
    values = {"eos_token_id": ids if len(ids) > 1 else ids[0], "pad_token_id": 0, "bos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def answer_to(prompt: str) -> str:
    return WORDS[sum(map(ord, prompt)) % len(WORDS)]


def write_rows(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": answer_to(p)}]}
        for p in PROMPTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@cache
def tune(name: str) -> tuple[Case, Path, Path]:
    """The case, its base, and the exported model, trained until it knows its rows."""
    case, folder = CASES[name], Path(tempfile.mkdtemp(prefix="ends-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = write_base(folder / "base", case)
    events: list[dict[str, Any]] = []
    settings = {
        "max_steps": 260,
        "learning_rate": 5e-3,
        "batch_size": 20,
        "dropout": 0.0,
        "validation_fraction": 0.0,
        "seed": 1,
    }
    run = Run.parse(
        {
            "base": str(base),
            "train_file": str(write_rows(folder / "rows.jsonl")),
            "work_dir": str(folder / "work"),
            "settings": settings,
        }
    )
    train(run, lambda t, **values: events.append({"t": t, **values}), lambda: False)
    assert [e for e in events if e["t"] == "metric"][-1]["loss"] < 0.05
    [export] = (folder / "work").rglob("generation_config.json")
    return case, base, export.parent
