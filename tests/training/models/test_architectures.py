"""Every architecture trains fully and with LoRA, and what it exports is what transformers and peft compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as t

from tests.training.models.architectures import CONFIGS, GROUPED, causal_lm
from tests.training.tiny import write_tokenizer
from training.engine.evaluate import batch_loss
from training.engine.optimizer import AdamW
from training.export.export_check import logits_of
from training.models.batch import pack
from training.models.causal_lm import CausalLM, TransformersDecoder
from training.models.generate import GenerateOptions, generate
from training.models.load import add_lora
from training.plan.catalog import from_config, lora_parameters
from training.plan.config import ALL_LINEAR, parse
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

QUICK = ("llama", "gemma3", "qwen3_moe", "mamba2", "phi3")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.campaign) for name in CONFIGS]
IDS = list(range(1, 40))

# Layers without an adapter by default: peft refuses those that a kernel of Mamba reads by itself.
LEFT_OUT = {"falcon_h1": 2, "mamba": 4, "mamba2": 2}


def train(model: CausalLM, steps: int) -> list[float]:
    """The losses of some steps on the same three documents."""
    rng = np.random.default_rng(0)
    batch = pack([(rng.integers(1, 300, n), np.ones(n)) for n in (9, 40, 5)])
    optimizer = AdamW(model, parse({"weight_decay": 0}))
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = batch_loss(model, batch, 1 / len(batch.targets))
        loss.backward()
        losses.append(float(loss))
        optimizer.step(3e-3, optimizer.grad_norm())
    model.eval()
    return losses


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_full_fine_tuning_learns_and_transformers_loads_the_result(name: str, tmp_path: Path) -> None:
    model = CausalLM(causal_lm(name))
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    model.save(tmp_path)
    theirs = t.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert close(logits_of(model, IDS), theirs(torch.tensor([IDS]), use_cache=False).logits[0])


@pytest.mark.parametrize("name", ALL)
def test_lora_learns_in_all_linear_layers_and_peft_loads_the_result(name: str, tmp_path: Path) -> None:
    model = CausalLM(causal_lm(name))
    model.add_lora(4, 8.0, 0.0, ALL_LINEAR, seed=1)
    assert model.lora
    assert model.lora["of"] - model.lora["layers"] == LEFT_OUT.get(name, 0)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    model.save_adapter(tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(causal_lm(name), tmp_path).eval()
    with torch.no_grad():
        assert close(logits_of(model, IDS), theirs(torch.tensor([IDS]), use_cache=False).logits[0])
    assert close(logits_of(model.merged(), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("name", ALL)
def test_greedy_text_is_that_of_the_whole_text_read_again(name: str, tmp_path: Path) -> None:
    model = CausalLM(causal_lm(name))
    assert model.cached, model.self_test_notes
    write_tokenizer(tmp_path)
    options = GenerateOptions(max_tokens=12, n=2, ignore_eos=True)
    texts = generate(model, Tokenizer.load(tmp_path), [5, 6, 7], options)
    ids = [5, 6, 7]
    for _ in range(12):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    assert [text.ids for text in texts] == [ids[3:]] * 2
    model.cached = False
    texts = generate(model, Tokenizer.load(tmp_path), [5, 6, 7], options)
    assert [text.ids for text in texts] == [ids[3:]] * 2


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon_h1"])
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_of_lora_are_those_of_peft(name: str, variant: str, tmp_path: Path) -> None:
    model = CausalLM(causal_lm(name))
    model.add_lora(4, 8.0, 0.0, ALL_LINEAR, seed=1, **{variant: True})
    losses = train(model, 3)
    assert losses[-1] < losses[0]
    model.save_adapter(tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(causal_lm(name), tmp_path).eval()
    assert getattr(theirs.peft_config["default"], variant)
    with torch.no_grad():
        assert close(logits_of(model, IDS), theirs(torch.tensor([IDS]), use_cache=False).logits[0])
    assert close(logits_of(model.merged(), IDS), logits_of(model, IDS))


@pytest.mark.parametrize(
    ("setting", "word"), [({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "DoRA")]
)
def test_what_experts_cannot_have_is_refused_before_training(setting: dict[str, Any], word: str) -> None:
    model = CausalLM(causal_lm("qwen3_moe"))
    with pytest.raises(Failure, match=word):
        add_lora(model, parse({"adapter": "lora"} | setting))


def test_an_adapter_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(Failure, match="dt_proj would change nothing"):
        CausalLM(causal_lm("mamba")).add_lora(4, 8.0, 0.0, ["dt_proj"])


def test_a_cache_that_changes_the_logits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba ignores a cache under any name but its own."""
    make = TransformersDecoder.__init__

    def misnamed(decoder: TransformersDecoder, *args: Any) -> None:
        make(decoder, *args)
        decoder.cache_name = "past_key_values"

    monkeypatch.setattr(TransformersDecoder, "__init__", misnamed)
    model = CausalLM(causal_lm("mamba2"))
    assert not model.cached
    assert "cache" in model.self_test_notes[-1]


def test_windows_are_tested_whatever_their_size() -> None:
    """A layer that attends to chunks, which packed rows do not support, with chunks longer than the test's texts."""
    config = t.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64
    )
    config.layer_types = ["chunked_attention", "full_attention"]
    model = CausalLM(t.AutoModelForCausalLM.from_config(config).eval())
    assert not model.packed
    assert model.config.attention_chunk_size == 64


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "qwen3_moe", "gpt_oss"])
def test_the_size_of_adapters_is_known_from_the_configuration(name: str) -> None:
    model = CausalLM(causal_lm(name))
    base = from_config(model.config.to_dict())
    model.add_lora(8, 8.0, 0.0, ALL_LINEAR)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(base, 8) == trained
