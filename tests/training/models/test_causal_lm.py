"""Any causal language model of transformers with the interface of the loop: no leak between documents, correct loss and
gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.models.architectures import CONFIGS, causal_lm
from tests.training.tiny import write_tokenizer
from training import command
from training.engine import device
from training.engine.evaluate import batch_loss
from training.export.export_check import logits_of
from training.models import document_attention
from training.models.attention import visible
from training.models.batch import Batch, pack
from training.models.causal_lm import CausalLM
from training.models.decoder import TransformerDecoder
from training.models.generate import GenerateOptions, generate
from training.models.kernels import main_grad
from training.models.load import load_model
from training.plan.events import Failure
from training.plan.run_file import Run
from training.text.tokenizer import Tokenizer

# Expected (supports packed rows, its head is a plain matrix product); (True, True) for the others.
SPECIAL = {"gemma2": (True, False)} | dict.fromkeys(
    ("bloom", "mamba", "mamba2", "falcon_h1", "lfm2", "qwen3_5"), (False, True)
)
LENGTHS = (9, 40, 5)


def make(name: str) -> CausalLM:
    return CausalLM(causal_lm(name))


def documents(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 300, n), rng.integers(0, 2, n)) for n in LENGTHS]


def separate_loss(model: CausalLM, batch: Batch) -> torch.Tensor:
    """The reference: each document alone through transformers, with plain cross-entropy."""
    place = {int(w): int(y) for w, y in zip(batch.loss_positions, batch.targets, strict=True)}
    total = torch.zeros(())
    for start, end in batch.bounds:
        logits = model.lm(input_ids=batch.ids[None, start:end], use_cache=False).logits[0]
        for w in range(start, end):
            if w in place:
                total = total + F.cross_entropy(
                    logits[w - start][None].float(), torch.tensor([place[w]]), reduction="sum"
                )
    return total / len(place)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_loss_and_gradients_are_those_of_each_document_alone(name):
    model = make(name)
    assert (model.packed, model.fused) == SPECIAL.get(name, (True, True)), model.self_test_notes
    batch = pack(documents())
    ours, _ = batch_loss(model, batch, 1 / len(batch.loss_positions))
    ours.backward()
    grads = {n: main_grad(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        main_grad(p).zero_()
    theirs = separate_loss(model, batch)
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    longest = max(float(main_grad(p).norm()) for p in model.parameters())
    for n, p in model.named_parameters():
        assert float((grads[n] - main_grad(p)).norm()) <= 1e-4 * longest, n


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_of_one_document_does_not_change_the_states_of_another(name):
    model = make(name)
    docs, others = documents(0), documents(1)
    with torch.no_grad():
        one, two = (model.hidden(pack([first, *docs[1:]]), all_tokens=True) for first in (docs[0], others[0]))
    assert torch.equal(one[LENGTHS[0] :], two[LENGTHS[0] :])
    assert not torch.equal(one[: LENGTHS[0]], two[: LENGTHS[0]])


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_no_tensor_grows_with_the_square_of_the_row(name):
    """Documents of one length, in rows of different lengths: attention is computed in each, without a mask over
    the row."""
    model = make(name)
    model.head = lambda: None  # type: ignore[method-assign]  # logits are not what is measured
    largest = []
    for documents_in_row in (16, 64):
        rng = np.random.default_rng(0)
        batch = pack([(rng.integers(1, 300, 40), np.ones(40)) for _ in range(documents_in_row)])
        with LargestTensor() as seen:
            model._packed_states(batch).sum().backward()
        largest.append(seen.numbers)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 2560 * 2560 / 4


@pytest.mark.parametrize("longest", [300, 600])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 70}, {"softcap": 2.0, "sliding_window": 70}])
def test_attention_in_blocks_is_that_by_the_formula(longest, options):
    """Documents longer than a window and than a block, against all scores at once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, longest + 9, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    offsets = torch.tensor([0, 9, longest + 9], dtype=torch.int32)
    outs = [document_attention.documents(q, k, v, offsets, **options)]
    document = (torch.arange(longest + 9) >= 9).int()
    seen = visible(0, longest + 9, 0, options.get("sliding_window"), q.device)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~(seen & (document[:, None] == document)), float("-inf"))
    outs.append((scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2))
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_saved_files_load_in_transformers_with_no_missing_or_unexpected_key(name, tmp_path):
    model = make(name)
    model.save(tmp_path)
    lm, info = t.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(1, 30)
    with torch.no_grad():
        assert torch.equal(lm.eval()(ids[None]).logits, model.lm(ids[None]).logits)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_only_adapters_train_and_they_merge_into_the_weights(name, tmp_path):
    model = make(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.add_lora(rank=4, alpha=8.0, dropout=0.0, targets=None, seed=1)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in n for n in trained)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    model.save(tmp_path)
    ids = list(range(1, 30))
    torch.testing.assert_close(
        logits_of(CausalLM.load(tmp_path), ids), logits_of(model, ids), rtol=1e-4, atol=1e-4
    )


def test_the_same_seed_draws_the_same_adapters():
    one, two = make("llama"), make("llama")
    for model in (one, two):
        torch.rand(3)
        model.add_lora(4, 8.0, 0.0, None, seed=7)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_lora_targets_that_match_no_layer_are_refused():
    with pytest.raises(Failure, match="lora_targets"):
        make("llama").add_lora(4, 8.0, 0.0, ["no_such_layer"])


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "mamba"])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    model = make(name)
    write_tokenizer(tmp_path)
    options = GenerateOptions(max_tokens=12, n=2, ignore_eos=True)
    ours = generate(model, Tokenizer.load(tmp_path), [5, 6, 7], options)
    whole = model.lm.generate(
        torch.tensor([[5, 6, 7]]),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert [c.ids for c in ours] == [whole[0, 3:].tolist()] * 2


def test_gpt2_with_rare_options_is_loaded_by_transformers(tmp_path):
    config = t.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, scale_attn_by_inverse_layer_idx=True
    )
    t.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, CausalLM)
    assert not isinstance(model.decoder(), TransformerDecoder)


def test_code_that_comes_with_a_model_is_refused(tmp_path):
    make("llama").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(Failure, match="never run"):
        CausalLM.load(tmp_path)


def test_weights_other_than_safetensors_are_refused(tmp_path: Path):
    make("llama").save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(Failure, match="no safetensors"):
        CausalLM.load(tmp_path)


def test_dropout_reaches_every_kind_of_layer():
    model = make("opt")
    model.set_dropout(0.5)
    model.train()
    batch = pack(documents())
    assert not torch.equal(model.hidden(batch), model.hidden(batch))
    model.eval()
    assert torch.equal(model.hidden(batch), model.hidden(batch))


# --- through the loop --------------------------------------------------------------------------------


def train(base: Path, work: Path, **settings: Any) -> list[dict[str, Any]]:
    data = work / "data.jsonl"
    work.mkdir()
    rows = [{"prompt": "the cat " * (1 + i % 4), "completion": "sat on the mat"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {
        "max_steps": 8,
        "batch_size": 8,
        "micro_batch_tokens": 64,
        "learning_rate": 1e-2,
        "validation_fraction": 0.25,
    }
    lines: list[dict[str, Any]] = []
    run = {
        "base": str(base),
        "train_file": str(data),
        "work_dir": str(work),
        "settings": chosen | settings,
        "rehearse": False,
    }
    command.train(Run.parse(run), lambda t, **values: lines.append({"t": t, **values}))
    return lines


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_collects_its_gradients(tmp_path, method, monkeypatch):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    base = tmp_path / "base"
    make("llama").save(base)
    write_tokenizer(base)
    full, half = (
        [
            line["loss"]
            for line in train(base, tmp_path / p, method=method, precision=p)
            if line["t"] == "metric"
        ]
        for p in ("fp32", "bf16")
    )
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)


@pytest.mark.parametrize(("name", "method"), [("llama", "full"), ("llama", "lora"), ("gemma2", "lora")])
def test_the_loop_trains_it_and_its_export_is_checked(tmp_path, name, method):
    base = tmp_path / "base"
    make(name).save(base)
    write_tokenizer(base)
    lines = train(base, tmp_path / "work", method=method, gradient_checkpointing=name == "llama")
    losses = [line["loss"] for line in lines if line["t"] == "eval"]
    assert losses[-1] < losses[0]
    assert lines[-1]["t"] == "done"
    assert lines[-1]["fidelity"]["exact"]
    tuned, info = t.AutoModelForCausalLM.from_pretrained(
        tmp_path / "work" / "final", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tuned.config.model_type == name
