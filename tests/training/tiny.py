"""The smallest real parts: a GPT-2 with two layers and random weights, and a byte-level tokenizer with 300 tokens."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import tokenizers
import torch

from training.models.architecture import gpt2_config
from training.models.transformer import Transformer

END = "<|endoftext|>"


@cache
def backend() -> str:
    """A byte-level BPE trained on a few lines, as the text of a tokenizer.json."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    lines = ["the cat sat on the mat and looked at the moon"] * 20 + ["naïve café, 猫 on a mat"] * 3
    tokenizer.train_from_iterator(
        lines, vocab_size=300, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return tokenizer.to_str()


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend())
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def gpt2(seed: int = 0, context: int = 64) -> Transformer:
    """Its weights are larger than after initialization, so that the output depends on the input."""
    vocab = tokenizers.Tokenizer.from_str(backend()).get_vocab_size()
    config = gpt2_config(vocab_size=vocab, n_positions=context, n_embd=32, n_layer=2, n_head=2)
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    model = Transformer.new(config, seed).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


def write_model(folder: Path, seed: int = 0, context: int = 64) -> Path:
    """Writes a base model. Returns its folder."""
    gpt2(seed, context).save(folder)
    write_tokenizer(folder)
    return folder
