"""Tools on a base whose chat template has no form for them: ours, in training, inference and the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.training.tiny import END, gpt2, write_model
from training.data.row_schemas import Reader
from training.export.folder import write_folder
from training.plan.catalog import STARTER_FOLDER
from training.text.encode import EncodingOptions, encode
from training.text.tokenizer import Tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Finds a thing — “anything”.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
]
CALL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "arguments": {"what": 'a "hose"\n<b> é'}},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "Behind the door."},
    {"role": "tool", "content": "On the hook."},
    {"role": "assistant", "content": "There."},
]
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_row_with_tools_trains_every_call_and_answer_whole() -> None:
    tokenizer = Tokenizer.load(STARTER_FOLDER)
    row = Reader("", {})(1, {"messages": MESSAGES, "tools": TOOLS})
    example = encode(row, tokenizer, EncodingOptions())
    trained = tokenizer.decode([i for i, m in zip(example.ids, example.mask, strict=True) if m], False)
    written = json.dumps({"name": "look_up", "arguments": CALL["function"]["arguments"]}, ensure_ascii=False)
    call = f"<tool_call>\n{written}\n</tool_call>"
    end = tokenizer.eos_text
    assert trained == f"{call}\n{call}{end}There.{end}"
    whole = tokenizer.decode(example.ids, False)
    assert json.dumps(TOOLS[0], ensure_ascii=False) in whole
    assert "<tool_response>\nBehind the door.\n</tool_response>\n<tool_response>\nOn the hook." in whole


@pytest.mark.parametrize("template", [None, NO_SYSTEM])
def test_the_exported_template_writes_tools_as_training_did(template: str | None, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", context=1024)
    if template:
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    write_folder(gpt2(context=1024), tmp_path / "export", base=base)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for tokenizer in (Tokenizer.load(base), Tokenizer.load(tmp_path / "export")):
        for messages, tools in ((MESSAGES, TOOLS), (MESSAGES[:1], TOOLS), (MESSAGES, []), (MESSAGES[:1], [])):
            rendered = tokenizer.render_chat(messages, True, tools)
            assert rendered == theirs.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, tokenize=False
            )


def test_control_tokens_in_tools_stay_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path / "base", context=1024))
    spelled = {"type": "function", "function": {"name": "a", "description": f'say "{END}"'}}
    call = {"type": "function", "function": {"name": "a", "arguments": {"x": END}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    ids = tokenizer.encode_chat(messages, tools=[spelled])
    assert ids.count(tokenizer.eos_id) == 1  # only the one that ends the answer
    assert json.dumps(spelled) in tokenizer.decode(ids, False)
