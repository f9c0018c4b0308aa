"""What training, generation and export need from a model. Transformer (transformer.py) and CausalLM
(causal_lm.py) are the implementations; load.py lists them.

Shapes: T tokens of a packed row, N of them trained, D the width of the model, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.models.batch import Batch
from training.models.decoder import Decoder


class LanguageModel(Protocol):
    """A causal language model over packed rows. All implementations are `torch.nn.Module`s."""

    lora: dict[str, Any] | None  # what lora.add returns; None = every weight is trained
    training: bool

    @property
    def layers(self) -> int: ...

    @property
    def attention_width(self) -> int:
        """Features of all query heads of a layer together."""
        ...

    @property
    def context(self) -> int:
        """The longest document it can read, in tokens."""
        ...

    @property
    def gradient_checkpointing(self) -> bool: ...
    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None: ...

    def hidden(self, batch: Batch, all_tokens: bool = False) -> Tensor:
        """Final states of the positions that predict a trained token, (N, D), or of all tokens, (T, D), if
        `all_tokens`.

        If `head()` is None they are logits already: (N, V) or (T, V)."""
        ...

    def head(self) -> Tensor | None:
        """(V, D): logits are states @ head.T. None if the head is not a plain matrix product (soft-capped,
        biased)."""
        ...

    def set_dropout(self, p: float) -> None:
        """Sets the probability of every dropout in the model."""
        ...

    def add_lora(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] | None,
        seed: int = 0,
        use_dora: bool = False,
        use_rslora: bool = False,
    ) -> None:
        """Freezes the weights and adds adapters, in place: to all linear layers but the head for ALL_LINEAR, to
        peft's default for the architecture for ATTENTION or None. Raises Failure("bad_settings") for unknown
        targets and for what the architecture cannot train."""
        ...

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and safetensors weights under Hugging Face's names, adapters folded in."""
        ...

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Writes the two files of a peft adapter. `base` is the folder or Hub name of the base model."""
        ...

    def decoder(self, pack: bool = True) -> Decoder:
        """For generating text. `pack` may copy the weights into a faster layout; without it they are read in
        place, so that a model in training needs no extra memory."""
        ...

    def merged(self) -> LanguageModel:
        """The model as it is exported: adapters merged into its weights. Unchanged weights may be shared with
        this model."""
        ...

    # ---- from torch.nn.Module ------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def float(self) -> Any: ...
    def cpu(self) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
