"""The model card: README.md with metadata of the run, and what users need to use the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from training.export.interface import Description
from training.plan.metrics import table
from training.plan.tasks import TASKS


def card(details: Mapping[str, Any], description: Description) -> str:
    """README.md as model hubs expect it: YAML metadata first, then text. `details`: see
    folder.write_folder."""
    base = str(details.get("base") or "")
    head = ["---", f"library_name: {description.library}", "pipeline_tag: text-generation"]
    if base and not os.path.isabs(base):
        head.append(f"base_model: {json.dumps(base)}")
    head += [f"license: {json.dumps(details['licence'])}"] if details.get("licence") else []
    head += ["tags:", "- llm-tuner", "- fine-tuned", *(f"- {tag}" for tag in description.tags), "---"]
    name = str(details.get("name") or details.get("job") or "A tuned model")
    parts = ["\n".join(head), f"# {name}", _intro(details, base), _usage(description.usage)]
    metrics = dict(details.get("metrics") or {})
    scores = metrics.pop("scores", None)
    parts += [_table("Results on held-out examples", metrics)] if metrics else []
    parts += [_scores(scores)] if scores else []
    parts += [_table("Settings", details["settings"])] if details.get("settings") else []
    if details.get("fidelity"):
        parts.append(_export_check(details["fidelity"]))
    parts.append(f"Weights: {description.weights}. Written by LLM Tuner.")
    return "\n\n".join(parts) + "\n"


def _intro(details: Mapping[str, Any], base: str) -> str:
    data = [f"{details[k]:,} {k}" for k in ("examples", "tokens", "steps") if isinstance(details.get(k), int)]
    made = (
        f"Fine-tuned from `{os.path.basename(base) if os.path.isabs(base) else base}`"
        if base
        else "Fine-tuned"
    )
    return made + (f" on {', '.join(data)}" if data else "") + _kept(details) + "."


def _kept(details: Mapping[str, Any]) -> str:
    """Which step's weights these are, if not those of the last step as planned."""
    step, kept = details.get("steps"), details.get("kept_step")
    if kept is None or (kept == step and not details.get("early")):
        return ""
    return (
        f" ({'stopped early at' if details.get('early') else 'trained to'} step {step:,}; kept step {kept:,})"
    )


def _usage(lines: str) -> str:
    fence = "```"
    return f"{fence}python\n{lines}\n{fence}\n\nThe tokenizer includes the chat template that the model was trained with."


def _table(title: str, values: Any) -> str:
    rows = [
        f"| {name} | {_cell(value)} |" for name, value in dict(values).items() if value not in (None, [], "")
    ]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


def _scores(scores: Mapping[str, Any]) -> str:
    """The metrics of the task, before and after training."""
    rows = [
        f"| {label} | {'' if base is None else f'{base:.1%}'} | {tuned:.1%} |"
        for label, _, base, tuned in table(scores)
    ]
    number = f"{scores['answers']:,} held-out {'answer' if scores['answers'] == 1 else 'answers'}"
    labels = f", {scores['labels']:,} labels" if scores.get("labels") else ""
    about = f"Task: {TASKS[scores['task']].label}. {number}{labels}, generated greedily."
    return "\n".join(["## Answers", "", about, "", "| | base | tuned |", "| --- | --- | --- |", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _export_check(result: Mapping[str, Any]) -> str:
    if result.get("exact"):
        return f"These files were read back and compared with the trained model: {result.get('logits', 0):,} logits, bit-for-bit equal."
    return f"These files were read back and compared with the trained model: the largest logit difference is {result.get('max_difference', 0):.2g}."
