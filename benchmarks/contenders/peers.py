"""The peers, each used as its own documentation recommends, one optimizer step per turn (turns.py).

Runs in the environment of the peers: `.bench/bin/python benchmarks/contenders/peers.py KIND FOLDER`, where FOLDER holds
the model, the tokenizer and `examples.json` (token ids in training order), written by benchmarks/training.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import torch.nn.functional as F
import transformers
import turns
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common import LLAMA_LINEAR

transformers.logging.set_verbosity_error()
BATCH, LENGTH = 8, 512
ON_GPU = torch.cuda.is_available()


def load(folder: Path, dropout: float) -> Any:
    if json.loads((folder / "config.json").read_text())["model_type"] != "gpt2":
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    rates: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32, **rates)


def hyperparameters(folder: Path) -> dict[str, Any]:
    """The same as `SETTINGS` in benchmarks/common.py."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": BATCH,
        "use_cpu": not ON_GPU,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "disable_tqdm": True,
        "bf16": ON_GPU,
    }


class Turns(TrainerCallback):
    """One step per turn; `watched` stores the number of tokens and the loss here."""

    def __init__(self) -> None:
        self.tokens, self.loss = 0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        turns.done(self.tokens, loss=self.loss)


def watched(kind: type[Trainer], callback: Turns) -> type[Trainer]:
    """The same trainer class, reading the examples in the given order and reporting tokens and losses."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            mask = inputs.get("attention_mask")
            callback.tokens = int(mask.sum() if mask is not None else inputs["input_ids"].numel())
            # Trainer divides by all labels, including the first of each row, which is never predicted.
            labels, predicted = ((t != -100).sum() for t in (inputs["labels"], inputs["labels"][:, 1:]))
            loss = super().training_step(model, inputs, *rest)
            callback.loss = float(loss * labels / predicted)
            return loss

    return Watched


def hf_trainer(
    folder: Path, ids: list[list[int]], *, padded: bool = False, lora: bool = False, dropout: float = 0.0
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = load(folder, dropout)
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    rows = {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}
    if padded:
        pad = tokenizer.pad_token_id
        rows = {
            "input_ids": [i + [pad] * (LENGTH - len(i)) for i in ids],
            "attention_mask": [[1] * len(i) + [0] * (LENGTH - len(i)) for i in ids],
        }
    callback = Turns()
    trainer = watched(Trainer, callback)(
        model=model,
        args=TrainingArguments(**hyperparameters(folder)),
        train_dataset=Dataset.from_dict(rows),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    )
    trainer.train()
    turns.begin()


def trl_sft(folder: Path, ids: list[list[int]], *, packing: bool, lora: bool = False) -> None:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shared = hyperparameters(folder) | ({"per_device_train_batch_size": 2} if packing else {})
    # Its defaults are bf16 and gradient checkpointing; both are slower on a CPU, so they are off.
    args = SFTConfig(
        **shared,
        packing=packing,
        max_length=LENGTH,
        gradient_checkpointing=False,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.eos_token,
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LLAMA_LINEAR, task_type="CAUSAL_LM")
    adapters: dict[str, Any] = {"peft_config": config} if lora else {}
    callback = Turns()
    trainer = watched(SFTTrainer, callback)(
        model=load(folder, 0.0),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        callbacks=[callback],
        **adapters,
    )
    trainer.train()
    turns.begin()


def nano_gpt(folder: Path, ids: list[list[int]]) -> None:
    """A plain packed loop in the style of nanoGPT: one stream of tokens cut into blocks, full logits, fused AdamW."""
    device = "cuda" if ON_GPU else "cpu"
    config = json.loads((folder / "config.json").read_text())
    heads = config["n_head"]
    weights = {
        n: p.detach().to(device).requires_grad_() for n, p in load(folder, 0.0).transformer.named_parameters()
    }
    stream = torch.tensor([i for example in ids for i in example], device=device)
    decay = [p for p in weights.values() if p.dim() >= 2]
    plain = [p for p in weights.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=1e-5, fused=True
    )
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], weights[f"{n}.weight"], weights[f"{n}.bias"])  # noqa: E731
    lin = lambda x, n: x @ weights[f"{n}.weight"] + weights[f"{n}.bias"]  # noqa: E731

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        B, T = x.shape
        h = weights["wte.weight"][x] + weights["wpe.weight"][:T]
        for i in range(config["n_layer"]):
            q, k, v = (
                t.view(B, T, heads, -1).transpose(1, 2)
                for t in lin(norm(h, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(h.shape[-1], 2)
            )
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + lin(a.transpose(1, 2).reshape(B, T, -1), f"h.{i}.attn.c_proj")
            up = F.gelu(lin(norm(h, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
            h = h + lin(up, f"h.{i}.mlp.c_proj")
        logits = norm(h, "ln_f") @ weights["wte.weight"].t()
        return F.cross_entropy(logits.view(B * T, -1), y.reshape(-1))

    block = min(LENGTH, config["n_positions"])
    for step in range(10_000):
        turns.begin()
        starts = [(step * 2 + r) * block % (len(stream) - block - 1) for r in range(2)]
        x = torch.stack([stream[s : s + block] for s in starts])
        y = torch.stack([stream[s + 1 : s + block + 1] for s in starts])
        with torch.autocast(device, torch.bfloat16, enabled=ON_GPU):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.done(2 * block, loss=loss.item())


def hf_generate(folder: Path, ids: list[list[int]]) -> None:
    """A prompt of 64 tokens, 48 new ones, greedy, batch size 1."""
    model = load(folder, 0.0).eval().to("cuda" if ON_GPU else "cpu")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompt = torch.tensor([ids[0][:64]], device=model.device)
    while True:
        turns.begin()
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=48,
                min_new_tokens=48,
                do_sample=False,
            )
        turns.done(48, text=out[0, prompt.shape[1] :].tolist())


KINDS = {
    "trainer": hf_trainer,
    "trainer-dropout": lambda f, ids: hf_trainer(f, ids, dropout=0.1),
    "trainer-padded": lambda f, ids: hf_trainer(f, ids, padded=True),
    "trainer-lora": lambda f, ids: hf_trainer(f, ids, lora=True),
    "trl": lambda f, ids: trl_sft(f, ids, packing=False),
    "trl-packing": lambda f, ids: trl_sft(f, ids, packing=True),
    "trl-lora": lambda f, ids: trl_sft(f, ids, packing=False, lora=True),
    "trl-packing-lora": lambda f, ids: trl_sft(f, ids, packing=True, lora=True),
    "nanogpt": nano_gpt,
    "generate": hf_generate,
}

if __name__ == "__main__":
    kind, where = sys.argv[1], Path(sys.argv[2])
    KINDS[kind](where, json.loads((where / "examples.json").read_text()))
