"""What a run starts from: the pinned prompts are read as the rows were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import write_model
from training.engine import inputs
from training.plan.run_file import Run

QUESTION = "the cat sat?"
ROWS: dict[str, tuple[dict[str, Any], bool]] = {
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        True,
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, True),
    "pairs of conversations": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        True,
    ),
    "pairs": ({"prompt": "a ", "completion": "b"}, False),
    "text": ({"text": "a b"}, False),
}


@pytest.mark.parametrize("kind", ROWS)
def test_pinned_prompts_are_encoded_as_the_rows_were(kind: str, tmp_path: Path) -> None:
    row, chat = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(12 * (json.dumps(row) + "\n"))
    values = {
        "base": str(write_model(tmp_path / "base")),
        "train_file": str(path),
        "work_dir": str(tmp_path / "work"),
        "prompts": [QUESTION],
    }
    data = inputs.read(Run.parse(values))
    tokenizer = data.tokenizer
    as_chat = tokenizer.encode_chat([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    assert data.prompts[0].ids == (as_chat if chat else tokenizer.encode(QUESTION))
