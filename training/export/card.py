"""The model card: README.md with the facts of the run in front, then what a person needs to use the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from training.export.interface import Description


def card(facts: Mapping[str, Any], description: Description) -> str:
    """README.md as model hubs read it: facts in front, then what a person needs to use the model."""
    base = str(facts.get("base") or "")
    head = ["---", f"library_name: {description.library}", "pipeline_tag: text-generation"]
    if base and not os.path.isabs(base):
        head.append(f"base_model: {json.dumps(base)}")
    head += [f"license: {json.dumps(facts['licence'])}"] if facts.get("licence") else []
    head += ["tags:", "- llm-tuner", "- fine-tuned", *(f"- {tag}" for tag in description.tags), "---"]
    name = str(facts.get("name") or facts.get("job") or "A tuned model")
    parts = ["\n".join(head), f"# {name}", _intro(facts, base), _usage(description.usage)]
    parts += [_table(title, facts.get(key)) for title, key in _TABLES if facts.get(key)]
    if facts.get("fidelity"):
        parts.append(_fidelity(facts["fidelity"]))
    parts.append(f"Weights: {description.weights}. Written by LLM Tuner.")
    return "\n\n".join(parts) + "\n"


_TABLES = (("Results on held-out examples", "metrics"), ("Settings", "settings"))


def _intro(facts: Mapping[str, Any], base: str) -> str:
    data = [f"{facts[k]:,} {k}" for k in ("examples", "tokens", "steps") if isinstance(facts.get(k), int)]
    made = (
        f"Fine-tuned from `{os.path.basename(base) if os.path.isabs(base) else base}`"
        if base
        else "Fine-tuned"
    )
    return made + (f" on {', '.join(data)}." if data else ".")


def _usage(lines: str) -> str:
    fence = "```"
    return f"{fence}python\n{lines}\n{fence}\n\nThe tokenizer includes the chat template that the model was trained with."


def _table(title: str, values: Any) -> str:
    rows = [
        f"| {name} | {_cell(value)} |" for name, value in dict(values).items() if value not in (None, [], "")
    ]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _fidelity(found: Mapping[str, Any]) -> str:
    if found.get("exact"):
        return f"These files were read back and compared with the trained model: {found.get('logits', 0):,} logits, bit-for-bit equal."
    return f"These files were read back and compared with the trained model: the largest logit difference is {found.get('max_difference', 0):.2g}."
