"""From a trained model to a folder that Hugging Face's libraries open: weights, configuration, tokenizer, model card.

    python -m training export --checkpoint DIR --to DIR [--format safetensors|merged|adapter] [--dtype fp32|fp16]

safetensors and merged write whole models (adapters folded in); adapter writes peft's two files, for the base model.
The folder is written whole or not at all: beside its place first, then renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from training.engine import checkpoint
from training.models.load import load_model
from training.plan import hub
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

ExportFormat = Literal["safetensors", "merged", "adapter"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


def write_folder(
    model: Any,
    to: str | Path,
    *,
    base: str | Path,
    format: ExportFormat = "safetensors",
    dtype: Literal["fp32", "fp16"] = "fp32",
    facts: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Write `model` to the folder `to` (made, or replaced) and say what is in it: [{"name", "bytes", "sha256"}].

    `base` is the folder of the base model, whose tokenizer goes along. `facts` is what the model card tells:
    job, base, settings, examples, tokens, steps, metrics, fidelity; whatever is missing is left out.
    The list is in manifest.json too."""
    to, base, facts = Path(to), Path(base), facts or {}
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
    try:
        draft.chmod(0o755)
        if format == "adapter":
            _save_adapter(model, draft, str(facts.get("base") or base))
        else:
            model.save(draft, DTYPES[dtype])
            _write_generation_config(draft, base)
        write_tokenizer(base, draft)
        for name in LICENCE_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, draft / name)
        (draft / "README.md").write_text(card(facts, format, dtype), encoding="utf-8")
        files = list_files(draft)
        (draft / "manifest.json").write_text(json.dumps({"files": files}, indent=1) + "\n")
        _sync(draft)
        if to.exists():
            shutil.rmtree(to)
        draft.rename(to)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return files


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file of a folder."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append({"name": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": digest})
    return found


def write_tokenizer(base: Path, to: Path) -> None:
    """The base model's tokenizer files, and in its configuration the chat template the model was trained with."""
    tokenizer = Tokenizer.load(base)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, to / name)
    if not (to / "tokenizer.json").is_file():  # GPT-2's older two files: the newer one holds both
        tokenizer.backend.save(str(to / "tokenizer.json"))
    path = to / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    config.pop("auto_map", None)  # code that comes with a model is never run, nor passed on
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if name not in config and name in tokenizer.config:
            config[name] = tokenizer.config[name]
    config["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_generation_config(to: Path, base: Path) -> None:
    """What transformers' generate should do by default; without it, it would not know where an answer ends."""
    if (to / "generation_config.json").is_file():
        return
    tokenizer = Tokenizer.load(base)
    values = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id or tokenizer.eos_id}
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    (to / "generation_config.json").write_text(json.dumps({"bos_token_id": bos} | values, indent=2) + "\n")


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    if getattr(model, "lora", None) is None:
        raise Failure("bad_settings", "This model was trained whole; there is no adapter to export.", "Export it as safetensors.")  # fmt: skip
    model.save_adapter(folder, base)


def _sync(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- the model card --------------------------------------------------------------------------------


def card(facts: Mapping[str, Any], format: ExportFormat, dtype: str) -> str:
    """README.md as model hubs read it: facts in front, then what a person needs to use the model."""
    base = str(facts.get("base") or "")
    adapter = format == "adapter"
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if base and not os.path.isabs(base):
        head.append(f"base_model: {json.dumps(base)}")
    head += [f"license: {json.dumps(facts['licence'])}"] if facts.get("licence") else []
    head += ["tags:", "- llm-tuner", "- fine-tuned", *(["- lora"] if adapter else []), "---"]
    name = str(facts.get("name") or facts.get("job") or "A tuned model")
    parts = ["\n".join(head), f"# {name}", _intro(facts, base), _usage(adapter)]
    parts += [_table(title, facts.get(key)) for title, key in _TABLES if facts.get(key)]
    if facts.get("fidelity"):
        parts.append(_fidelity(facts["fidelity"]))
    parts.append(f"Weights: {'adapter, ' if adapter else ''}{dtype}, safetensors. Written by LLM Tuner.")
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


def _usage(adapter: bool) -> str:
    if adapter:
        lines = "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
    else:
        lines = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)"
    return (
        f"```python\n{lines}\n```\n\nThe tokenizer carries the chat template that the model was trained with."
    )


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
        return f"These files were read back and compared with the trained model: {found.get('logits', 0):,} logits, equal bit for bit."  # fmt: skip
    return f"These files were read back and compared with the trained model: the largest logit difference is {found.get('max_difference', 0):.2g}."  # fmt: skip


# --- command line ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of a training run, or a folder of Hugging Face files")  # fmt: skip
    parser.add_argument(
        "--base",
        help="the base model of that checkpoint, if it is no longer where it was: a folder, or a name on the Hub",
    )
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "merged", "adapter"])
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))


def main(args: argparse.Namespace) -> int:
    """Prints one JSON line: the files written and how they compare with the model in memory."""
    from training.export.export_check import compare

    model, base, facts = load_trained(Path(args.checkpoint), args.base)
    files = write_folder(model, args.to, base=base, format=args.format, dtype=args.dtype, facts=facts)
    found = compare(model, args.to, base=base)
    print(json.dumps({"files": files, "fidelity": found}))
    return 0 if found["close"] else 1


def load_trained(folder: Path, base: str | None) -> tuple[Any, Path, dict[str, Any]]:
    """The model of a checkpoint (made from `base`) or of a Hugging Face folder, the folder its tokenizer lies in, and
    what is known of it."""
    if (folder / "config.json").is_file():
        return load_model(folder), folder, {}
    try:
        manifest = checkpoint.verify_files(folder)
    except (checkpoint.Unreadable, OSError, ValueError, KeyError) as error:
        raise Failure("checkpoint_unreadable", f"The checkpoint {folder} cannot be used: {error}.") from error
    base = base or str(manifest["base"])
    home, settings = hub.locate(base), manifest["settings"]
    model = load_model(home)
    if settings.get("method") == "lora":
        model.add_lora(*(settings[f"lora_{name}"] for name in ("rank", "alpha", "dropout", "targets")))
    trained = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.copy_(trained.pop(name))
    if trained:
        raise Failure(
            "base_model", f"The checkpoint is not one of {base}: that has no {next(iter(trained))}."
        )
    facts = {"base": base, "steps": manifest["step"], "settings": settings}
    return model, home, facts
