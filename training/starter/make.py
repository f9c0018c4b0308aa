"""Makes the bundled starter: a GPT-2 with four million parameters, trained from scratch on WordNet's
definitions.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python -m training.starter.make --wordnet wordnet/usr/share --out round0
    python -m training.starter.make --wordnet wordnet/usr/share --out round1 --start round0 --round 1
    python -m training.starter.make --wordnet wordnet/usr/share --out round2 --start round1 --round 2
    python -m training.starter.make --wordnet wordnet/usr/share --start round2 --round 3

Writes tokenizer, weights (float16) and model card. A round takes about a quarter of an hour on one core, with
its own warmup and decay. Nothing else depends on this file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from training.models import kernels
from training.models.architecture import gpt2_config
from training.models.batch import Batch, pack
from training.models.transformer import Transformer
from training.starter.text import documents
from training.text.tokenizer import CHAT_TEMPLATE, Tokenizer

MODEL = Path(__file__).parent / "model"
END = "<|endoftext|>"
VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 4096, 512, 256, 4, 4
BATCH = 8  # rows of CONTEXT tokens a step
HELD_OUT = 0.02


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--wordnet", type=Path, required=True, help="the folder with wordnet/ and doc/")
    options.add_argument("--out", type=Path, default=MODEL)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--start", type=Path, help="continue from the weights in this folder")
    options.add_argument(
        "--round",
        type=int,
        default=0,
        help="number of the training round; each uses another order of the rows",
    )
    options.add_argument("--tokenizer-only", action="store_true")
    given = options.parse_args()

    texts = documents(given.wordnet / "wordnet", given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "tokenizer.json").exists():
        make_tokenizer(texts, given.out)
    if given.tokenizer_only:
        return
    tokenizer = Tokenizer.load(given.out)
    held = texts[: round(len(texts) * HELD_OUT)]
    train_rows, held_rows = rows(texts[len(held) :], tokenizer), rows(held, tokenizer)
    print(
        f"{len(texts)} documents, {train_rows.size} training tokens, {held_rows.size} held-out tokens",
        flush=True,
    )
    loss = train(train_rows, held_rows, given.steps, given.seed, given.out, given.start, given.round)
    license_text = (given.wordnet / "doc" / "wordnet-base" / "copyright").read_text(encoding="utf-8")
    rounds = given.round + 1
    write_card(given.out, loss, len(texts), train_rows.size, given.steps, rounds, given.seed, license_text)


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Trains a byte-level BPE tokenizer like GPT-2's, with 4096 tokens of its own, and writes it in
    Hugging Face's files."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def rows(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents concatenated and cut into rows of CONTEXT + 1 tokens, (rows, CONTEXT + 1)."""
    ids = np.concatenate(
        [np.asarray([*part, tokenizer.eos_id], np.int32) for part in tokenizer.encode_batch(texts)]
    )
    count = (len(ids) - 1) // CONTEXT
    starts = np.arange(count)[:, None] * CONTEXT
    packed: np.ndarray = ids[starts + np.arange(CONTEXT + 1)]
    return packed


def batch_of(part: np.ndarray) -> Batch:
    """Each row is one document of CONTEXT tokens; all tokens but the first are trained on."""
    return pack([(row[:CONTEXT], np.ones(CONTEXT, np.uint8)) for row in part])


def train(
    train_rows: np.ndarray,
    held_rows: np.ndarray,
    steps: int,
    seed: int,
    folder: Path,
    start: Path | None,
    turn: int,
) -> float:
    """Trains and returns the held-out loss in nats per token. Writes the weights to `folder` at each
    evaluation."""
    torch.manual_seed(seed)
    config = gpt2_config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Transformer.load(start) if start else Transformer.new(config, seed)
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and ".h." in name]
    others = [p for p in named.values() if not any(p is m for m in matrices)]
    momentum = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng([seed, turn] if turn else seed)
    order = np.concatenate(
        [rng.permutation(len(train_rows)) for _ in range(1 + steps * BATCH // len(train_rows))]
    )
    began, loss = time.time(), math.nan
    for step in range(steps):
        batch = batch_of(train_rows[order[step * BATCH : (step + 1) * BATCH]])
        value, _ = kernels.head_loss(model.hidden(batch), batch.targets, model.head(), 1 / len(batch.targets))
        value.backward()
        # Constant, then down to a tenth over the last half: most of the improvement comes while the rate
        # falls.
        rate = min(1.0, (step + 1) / 50) * min(1.0, 0.1 + 1.8 * (1 - step / steps))
        for p, memory in zip(matrices, momentum, strict=True):
            grad = kernels.main_grad(p)
            memory.lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(memory, 0.95))
            p.data.mul_(1 - 0.01 * 0.02 * rate).add_(
                update, alpha=-0.02 * rate * max(1, p.shape[1] / p.shape[0]) ** 0.5
            )
            grad.zero_()
        for p in others:
            p.grad = kernels.main_grad(p)
        adam.param_groups[0]["lr"] = 2e-3 * rate
        adam.step()
        for p in others:
            kernels.main_grad(p).zero_()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {value.item():.4f} {time.time() - began:.0f} s", flush=True)
        if step % 400 == 399 or step == steps - 1:
            loss = evaluate(model, held_rows)
            model.save(folder, torch.float16)
            print(f"step {step} held-out loss {loss:.4f}", flush=True)
    return loss


@torch.no_grad()
def evaluate(model: Transformer, held_rows: np.ndarray) -> float:
    total = count = 0.0
    for i in range(0, len(held_rows), BATCH):
        batch = batch_of(held_rows[i : i + BATCH])
        logits = model.hidden(batch) @ model.head().T
        total += torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        count += len(batch.targets)
    return total / count


def orthogonal(g: Tensor) -> Tensor:
    """A nearby matrix whose singular values are about 1: Muon's update (Jordan et al.,
    https://kellerjordan.github.io/posts/muon/), by five Newton-Schulz steps. g (m, n) -> (m, n)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    update: Tensor = x.T if g.shape[0] > g.shape[1] else x
    return update


def write_card(
    folder: Path, loss: float, texts: int, tokens: int, steps: int, rounds: int, seed: int, copyright: str
) -> None:
    license_text = re.search(r"License: WordNet3\.0\n(.*?)\n\n", copyright, re.DOTALL)
    words = re.sub(r"^ \.?", "", license_text[1], flags=re.MULTILINE) if license_text else copyright
    (folder / "README.md").write_text(
        f"""---
license: other
license_name: wordnet
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Starter

A GPT-2 of {LAYERS} layers, {WIDTH} wide, {HEADS} heads, {CONTEXT} tokens of context and its own byte-level BPE of {VOCAB} tokens
({VOCAB * WIDTH + CONTEXT * WIDTH + LAYERS * (12 * WIDTH * WIDTH + 13 * WIDTH) + 2 * WIDTH:,} parameters, float16), trained from scratch by `training/starter/make.py`. It comes with the studio, so that the first
fine-tune needs no network. It writes English like a dictionary's; it knows little and should be trusted with nothing.

- Data: definitions and examples of WordNet 3.0 (Debian package wordnet-base), turned into sentences by
  `training/starter/text.py`: {texts} documents, {tokens:,} training tokens. {HELD_OUT:.0%} of the documents were held out.
- Training: {rounds} rounds of {steps} steps of {BATCH} rows of {CONTEXT} tokens, Muon for the layers' matrices and AdamW for the rest, seed {seed}.
- Held-out loss: {loss:.3f} nats a token (perplexity {math.exp(loss):.1f}).

The weights and this card are under Apache-2.0. The text they were trained on is under WordNet's license:

```
{words.strip()}
```
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
