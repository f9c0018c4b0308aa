"""Warm-up: what the first step would otherwise pay for, done in advance."""

from __future__ import annotations

import numpy as np
import torch

from training.engine import loop  # noqa: F401  # imported for its imports
from training.engine.evaluate import batch_loss
from training.engine.optimizer import AdamW
from training.models.architecture import gpt2_config
from training.models.batch import pack
from training.models.transformer import Transformer
from training.plan.config import Settings


def warm_up() -> None:
    """Trains one step of a tiny GPT-2, which starts threads, selects kernels and pages in code. Random
    state is restored."""
    state = torch.get_rng_state()
    model = Transformer.new(gpt2_config(vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    optimizer = AdamW(model, Settings())
    row = pack([(np.arange(16, dtype=np.int32), np.ones(16, np.uint8))] * 2)
    batch_loss(model, row, 1.0)[0].backward()
    optimizer.step(1e-3, optimizer.grad_norm())
    a = torch.randn(256, 768)
    torch.mm(a, torch.randn(768, 768))
    torch.set_rng_state(state)
