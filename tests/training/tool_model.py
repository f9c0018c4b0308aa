"""A tiny model that has learned to call a tool, for tests of what is made of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from tests.training.tiny import END, backend
from training.command import train
from training.models.architecture import gpt2_config
from training.models.transformer import Transformer
from training.plan.run_file import Run

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
MISTRAL = (
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ m.content }}{% if m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}"
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
CONTROL = ("[AVAILABLE_TOOLS]", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]")
# What it answers: text, and the arguments of its calls of `look_up`.
ANSWERS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "the cat?": ("", [{"what": 'the "cat"\né'}]),
    "a moon and a mat?": ("On it.", [{"what": "moon"}, {"what": "mat", "n": {"at": [1, None]}}]),
    "looked?": ("the moon", []),
}
AFTER = "the mat"  # the answer to the result of the first call


def messages_of(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def write_tool_base(base: Path, template: str | None = None, control: tuple[str, ...] = ()) -> Path:
    """An untrained model that has this chat template. Returns its folder."""
    base.mkdir(parents=True)
    tokenizer = tokenizers.Tokenizer.from_str(backend())
    tokenizer.add_special_tokens(list(control))
    config = gpt2_config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=512, n_embd=48, n_layer=2, n_head=2
    )
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    Transformer.new(config, 1).save(base)
    tokenizer.save(str(base / "tokenizer.json"))
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    (base / "tokenizer_config.json").write_text(
        json.dumps(names | ({"chat_template": template} if template else {}))
    )
    return base


def write_tool_model(folder: Path, template: str | None = None, control: tuple[str, ...] = ()) -> Path:
    """Trains the model until it knows its answers. Returns the exported folder."""
    base = write_tool_base(folder / "base", template, control)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
    settings = {
        "max_steps": 220,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "dropout": 0.0,
        "validation_fraction": 0.0,
        "seed": 1,
    }
    run = Run.parse(
        {
            "base": str(base),
            "train_file": str(folder / "rows.jsonl"),
            "work_dir": str(folder / "work"),
            "settings": settings,
        }
    )
    losses: list[float] = []

    def on_event(t: str, **values: Any) -> None:
        if t == "metric":
            losses.append(values["loss"])

    train(run, on_event, lambda: False)
    assert losses[-1] < 0.05, losses[-1]
    [export] = (folder / "work").rglob("generation_config.json")
    return export.parent


def _rows() -> list[dict[str, Any]]:
    rows = []
    for prompt, (text, calls) in ANSWERS.items():
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": "look_up", "arguments": json.dumps(arguments)}}
                for arguments in calls
            ]
        rows.append({"messages": [*messages_of(prompt), answer], "tools": TOOLS})
    first = rows[0]["messages"]
    rows.append(
        {
            "messages": [
                *first,
                {"role": "tool", "content": "on it"},
                {"role": "assistant", "content": AFTER},
            ],
            "tools": TOOLS,
        }
    )
    return rows
