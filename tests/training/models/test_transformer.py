"""Our decoder compared with transformers, for every family that it implements, with tiny random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.training.tiny import write_tokenizer
from training.engine.device import flop_counter
from training.engine.evaluate import batch_loss
from training.engine.optimizer import AdamW
from training.models import attention, kernels
from training.models.architecture import architecture_of, is_supported
from training.models.attention import Heads
from training.models.batch import pack
from training.models.causal_lm import CausalLM
from training.models.generate import GenerateOptions, generate
from training.models.load import load_model
from training.models.transformer import Transformer
from training.plan.config import Settings
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**SHAPE),
    "llama-biased": lambda: t.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=16),
    "llama3": lambda: t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": lambda: t.LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama-yarn": lambda: t.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": lambda: t.MistralConfig(**SHAPE, sliding_window=20),
    "qwen2": lambda: t.Qwen2Config(**SHAPE),
    "qwen2-windows": lambda: t.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: t.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "granite": lambda: t.GraniteConfig(
        **SHAPE,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "smollm3": lambda: t.SmolLM3Config(**SHAPE | {"num_hidden_layers": 5}),
    "gpt2": lambda: t.GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=128),
}
LENGTHS = (9, 40, 5, 60)


@pytest.fixture(scope="session", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, written by transformers."""
    return write(request.param, tmp_path_factory.mktemp(request.param))


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    lm = t.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    lm.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def theirs(folder: Path) -> Any:
    lm = t.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return lm.eval()


def documents(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 300, n).astype(np.int32), rng.integers(0, 2, n)) for n in LENGTHS]


def logits(model: Transformer, docs: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    with torch.no_grad():
        return model.hidden(pack(docs), all_tokens=True) @ model.head().t()


def plain_loss(lm: Any, docs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Each document alone through transformers; the gradients accumulate in the model."""
    count, total = sum(int(mask[1:].sum()) for _, mask in docs), 0.0
    for ids, mask in docs:
        x = torch.from_numpy(ids.astype(np.int64))
        targets = torch.where(torch.from_numpy(mask).bool(), x, -100)[1:]
        predicted = lm(x[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(predicted, targets, reduction="sum", ignore_index=-100) / count
        loss.backward()
        total += float(loss.detach())
    return total


def relative(a: torch.Tensor, b: torch.Tensor | None) -> float:
    assert b is not None
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def compare_gradients(model: Transformer, wanted: dict[str, Any], lm: Any) -> None:
    optimizer, row = AdamW(model, Settings()), pack(documents())
    loss, _ = batch_loss(model, row, 1.0 / len(row.targets))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(plain_loss(lm, documents()), rel=1e-5)
    assert optimizer.spans.keys() == wanted.keys()
    longest = max(float(p.grad.norm()) for p in wanted.values())
    for name in optimizer.spans:
        grad = optimizer.window(optimizer.grads, name)
        # A bias of the keys has only rounding errors for a gradient: softmax does not depend on it.
        small = float((grad - wanted[name].grad).norm()) < 1e-6 * longest
        assert small or relative(grad, wanted[name].grad) < 1e-4, name


# ---- training ----------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers_for_each_document_alone(folder: Path) -> None:
    model, lm = load_model(folder), theirs(folder)
    assert isinstance(model, Transformer)
    with torch.no_grad():
        wanted = torch.cat(
            [lm(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids, _ in documents()]
        )
    assert float((logits(model.eval(), documents()) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_packed_rows_equal_each_document_alone_and_do_not_leak(folder: Path) -> None:
    model, docs = Transformer.load(folder).eval(), documents()
    packed, alone = logits(model, docs), torch.cat([logits(model, [doc]) for doc in docs])
    assert relative(packed, alone) < 1e-5
    changed = logits(model, [documents(1)[0], *docs[1:]])
    assert torch.equal(packed[LENGTHS[0] :], changed[LENGTHS[0] :])
    assert not torch.equal(packed[: LENGTHS[0]], changed[: LENGTHS[0]])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_loss_and_gradients_are_those_of_transformers(folder: Path, checkpointing: bool) -> None:
    model, lm = Transformer.load(folder).train(), theirs(folder)
    model.set_dropout(0.0)
    model.gradient_checkpointing = checkpointing
    compare_gradients(model, dict(lm.named_parameters()), lm)


def test_adapters_are_those_of_peft(folder: Path, tmp_path: Path) -> None:
    model, lm = Transformer.load(folder).train(), theirs(folder)
    model.set_dropout(0.0)
    targets = sorted({*model.a.names.qkv, model.a.names.attention_out, *model.a.names.up, model.a.names.down})
    model.add_lora(4, 8.0, 0.0, targets, seed=1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=not model.a.out_in, task_type="CAUSAL_LM"
    )
    lm = peft.get_peft_model(lm, config)
    matching = {
        name.replace("base_model.model.", "").replace(".default", ""): p
        for name, p in lm.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
                matching[name].copy_(p)
    compare_gradients(model, matching, lm)
    # merged, saved and loaded, and as an adapter of its base
    ids = torch.arange(1, 60)
    model.eval().save(tmp_path / "merged")
    model.save_adapter(tmp_path / "adapter", str(folder))
    adapted = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = lm.eval()(ids[None]).logits[0]
        for other in (theirs(tmp_path / "merged"), adapted):
            assert relative(other(ids[None]).logits[0], wanted) < 1e-5


def test_saved_files_load_in_transformers_with_equal_logits(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"unknown_key": [1, {"a": 2}]}
    model = Transformer.load(folder)
    model.config = config
    model.save(tmp_path)
    auto: Any = t.AutoModelForCausalLM
    lm, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in config if key != "dtype"} == {
        key: value for key, value in config.items() if key != "dtype"
    }
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        assert torch.equal(lm.eval()(ids).logits, auto.from_pretrained(folder).eval()(ids).logits)


def test_attention_dropout_draws_and_keeps_the_mean(folder: Path) -> None:
    model, docs = Transformer.load(folder), documents()
    model.set_dropout(0.2)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([model.hidden(pack(docs)) for _ in range(2)])
    assert not torch.equal(draws[0], draws[1])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.hidden(pack(docs)), model.hidden(pack(docs)))


def test_the_flop_count_leaves_out_embeddings_that_are_only_looked_up(folder: Path) -> None:
    model = Transformer.load(folder)
    a, count = model.a, flop_counter(model, lora=False)
    linear = (
        a.width * (2 * a.heads + 2 * a.kv_heads) * a.head_size + (len(a.names.up) + 1) * a.width * a.inner
    )
    attention = 6 * a.layers * a.heads * a.head_size * 10 * 11
    assert count([10], 4) == 6 * (a.layers * linear * 10 + a.vocabulary * a.width * 4) + attention


# ---- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "in-place"])
def test_greedy_text_is_that_of_transformers(folder: Path, packed: bool) -> None:
    model, lm = Transformer.load(folder).eval(), theirs(folder)
    prompts = [[5, 6, 7], [9, *range(40, 66)]]  # the second is longer than the windows
    options = GenerateOptions(max_tokens=30, n=2, ignore_eos=True)
    for prompt in prompts:
        written = generate(model, Tokenizer.load(folder), prompt, options, decoder=model.decoder(packed))
        whole = lm.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert [c.ids for c in written] == [whole[0, len(prompt) :].tolist()] * 2


def test_sequences_of_different_lengths_step_together(folder: Path) -> None:
    decoder = Transformer.load(folder).eval().decoder()
    caches = [decoder.prefill(list(range(1, n)), 64)[0] for n in (4, 30, 11)]
    alone = torch.cat([decoder.step([decoder.fork(cache)], [7]) for cache in caches])
    torch.testing.assert_close(decoder.step(caches, [7, 7, 7]), alone, rtol=1e-4, atol=1e-4)


# ---- which models ------------------------------------------------------------------------------------------

LLAMA = SHAPE | {"model_type": "llama", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"hidden_act": "gelu"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"quantization_config": {"bits": 4}},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": None},
        {"vocab_size": "many"},
        {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
        {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
        {"model_type": "qwen2", "mlp_bias": True},
    ],
    ids=str,
)
def test_anything_unusual_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert is_supported(LLAMA)
    assert not is_supported(LLAMA | changes)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, LINEAR, LINEAR | {"rope_type": "dynamic"}], ids=str)
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_rotary_frequencies_are_those_of_transformers(scaling: dict[str, Any], old: bool) -> None:
    config = LLAMA | {"head_dim": 64, "max_position_embeddings": 4096}
    if old:
        config |= {"rope_scaling": {k: v for k, v in scaling.items() if k != "rope_theta"}}
    else:
        config |= {"rope_parameters": scaling}
    a = architecture_of(config)
    assert a is not None
    assert a.rotary is not None
    kind = scaling["rope_type"]
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](t.LlamaConfig(**config), seq_len=1)
    torch.testing.assert_close(torch.tensor(a.rotary.frequencies), wanted, rtol=1e-6, atol=0)
    assert a.rotary.factor == pytest.approx(factor)


def test_a_model_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    write("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(Failure, match="does not fit its config"):
        load_model(tmp_path)


def test_gemma_is_left_to_transformers(tmp_path: Path) -> None:
    t.AutoModelForCausalLM.from_config(t.Gemma3TextConfig(**SHAPE, head_dim=16)).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), CausalLM)


# ---- kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 48), (20, 3, 16)])
def test_the_rms_norm_equals_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    go = torch.randn(shape)
    y = kernels.RMSNorm.apply(x, w, 1e-5)
    (dx,) = torch.autograd.grad(y, x, go)
    plain = F.rms_norm(x, (shape[-1],), w, 1e-5)
    wanted = torch.autograd.grad(plain, (x, w), go)
    assert relative(y, plain) < 1e-6
    assert relative(dx, wanted[0]) < 1e-6
    assert relative(kernels.main_grad(w), wanted[1]) < 1e-6


def test_swiglu_equals_the_plain_formula() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(30, 40, requires_grad=True) for _ in range(2))
    go = torch.randn(30, 40)
    fast, plain = kernels.SwiGLU.apply(gate, up), F.silu(gate) * up
    torch.testing.assert_close(fast, plain)
    for one, other in zip(
        torch.autograd.grad(fast, (gate, up), go), torch.autograd.grad(plain, (gate, up), go), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 1, 7, 12], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_attention_equals_the_plain_formula(
    heads: tuple[int, int], window: int | None, dropout: float
) -> None:
    torch.manual_seed(2)
    H, G = heads
    shape = Heads(H, G, 16, 0.3, window)
    qkv = torch.randn(30, (H + 2 * G) * 16, requires_grad=True)
    bounds, go = [(0, 11), (11, 30)], torch.randn(30, H * 16)
    torch.manual_seed(5)
    kernel = attention.DropoutAttention if dropout else attention.DocumentAttention
    fast = kernel.apply(qkv, bounds, shape, dropout)
    (fast_grad,) = torch.autograd.grad(fast, qkv, go)
    torch.manual_seed(5)
    plain = plain_attention(qkv, bounds, shape, dropout)
    (wanted,) = torch.autograd.grad(plain, qkv, go)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_grad, wanted, rtol=1e-4, atol=1e-5)
    if not dropout:
        torch.testing.assert_close(attention.plain_attention(qkv, bounds, shape), plain, rtol=1e-4, atol=1e-5)


def plain_attention(
    qkv: torch.Tensor, bounds: list[tuple[int, int]], shape: Heads, dropout: float
) -> torch.Tensor:
    """softmax(q @ k.T * scale) @ v per document with the whole mask; dropout draws piece by piece, as ours does."""
    outs = []
    for s, e in bounds:
        q, k, v = (x.transpose(0, 1) for x in shape.split(qkv[s:e]))
        k, v = (x.repeat_interleave(shape.shared, 0) for x in (k, v))
        back = torch.arange(e - s)[:, None] - torch.arange(e - s)
        hidden = (back < 0) | (back >= (shape.window or e))
        probs = torch.softmax((q @ k.transpose(1, 2) * shape.scale).masked_fill(hidden, float("-inf")), -1)
        if dropout:
            keep = torch.ones(shape.queries, e - s, e - s, dtype=torch.bool)
            for piece in attention.pieces([(0, e - s)], shape.window):
                size = (shape.keys, shape.shared * (piece.end - piece.start), piece.end - piece.first)
                drawn = kernels.keep_mask(size, dropout)
                keep[:, piece.start : piece.end, piece.first : piece.end] = drawn.view(
                    shape.queries, piece.end - piece.start, -1
                )
            probs = probs * keep / kernels.keep_probability(dropout)
        outs.append((probs @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)
