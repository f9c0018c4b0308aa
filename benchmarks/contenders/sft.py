"""TRL's SFTTrainer on the rows of `bin/bench tools`, as its documentation recommends for prompts and completions.

Runs in the environment of the peers: `.bench/bin/python benchmarks/contenders/sft.py WORK.json`. The file names the base
model, a folder whose tokenizer has the chat template to use, the rows in training order, and the hyperparameters. Writes
the model as a Hugging Face folder, and the token ids and labels that TRL made.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()


def rendered(tokenizer: Any, row: dict[str, Any]) -> dict[str, str]:
    """The prompt as at inference, and the answer with the token that ends it."""
    messages = row["messages"]
    for message in messages:
        for call in message.get("tool_calls", ()):  # chat templates take objects
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    render = tokenizer.apply_chat_template
    prompt = render(messages[:-1], tools=row["tools"], add_generation_prompt=True, tokenize=False)
    whole = render(messages, tools=row["tools"], tokenize=False)
    assert whole.startswith(prompt)
    return {"prompt": prompt, "completion": whole.removeprefix(prompt).rstrip()}


class InOrder(SFTTrainer):  # type: ignore[misc]
    """Reads the rows in the given order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(work: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work["tokenizer"])
    rows = [rendered(tokenizer, json.loads(line)) for line in Path(work["rows"]).read_text().splitlines()]
    settings, lora = work["settings"], None
    if settings["adapter"] == "lora":
        from peft import LoraConfig

        lora = LoraConfig(
            r=settings["lora_rank"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=0.0,
            target_modules=settings["lora_targets"],
            task_type="CAUSAL_LM",
        )
    arguments = SFTConfig(
        output_dir=work["out"] + ".trainer",
        per_device_train_batch_size=settings["batch_size"],
        num_train_epochs=1,  # the rows of all epochs are given
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_norm"],
        max_length=settings["sequence_length"],
        seed=settings["seed"],
        # Its defaults are bf16 and gradient checkpointing; both are slower on a CPU, and ours computes in fp32 there.
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        eos_token=tokenizer.eos_token,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(work["base"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    examples = [[row["input_ids"], row["labels"]] for row in trainer.train_dataset]
    Path(work["out"] + ".ids.json").write_text(json.dumps(examples))
    trainer.train()
    model = trainer.model.merge_and_unload() if lora else trainer.model
    model.save_pretrained(work["out"])
    tokenizer.save_pretrained(work["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
