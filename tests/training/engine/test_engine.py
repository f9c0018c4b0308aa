"""The fast engine compared with a plain one: transformers' eager GPT-2 in fp32, each document alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.engine.evaluate import batch_loss, evaluate
from training.engine.optimizer import AdamW
from training.engine.packing import Examples
from training.models import kernels
from training.models.architecture import gpt2_config
from training.models.batch import pack
from training.models.transformer import Transformer
from training.plan.config import Settings

Document = tuple[np.ndarray, np.ndarray]
VOCAB = 5000  # more than one block of the fused head
SIZES = {"small": (12, 12), "medium": (24, 16), "large": (36, 20), "xl": (48, 25)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documents(completion_only: bool, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    lengths = [20, 7, 64, 2, 100, 33]
    start = (lambda n: n // 2) if completion_only else (lambda n: 1)
    return [
        (rng.integers(0, VOCAB, n).astype(np.int32), (np.arange(n) >= start(n)).astype(np.uint8))
        for n in lengths
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = Transformer.new(gpt2_config(vocab_size=VOCAB, n_positions=128, n_embd=48, n_layer=3, n_head=4))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    model.save(folder)
    return folder


def theirs(folder: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def plain_loss(model: Any, docs: list[Document]) -> float:
    """The summed loss of each document alone; the gradients accumulate in the model."""
    count = sum(int(mask[1:].sum()) for _, mask in docs)
    total = 0.0
    for ids, mask in docs:
        x = torch.from_numpy(ids.astype(np.int64))
        targets = torch.where(torch.from_numpy(mask).bool(), x, -100)[1:]
        loss = (
            F.cross_entropy(model(x[None]).logits[0, :-1], targets, reduction="sum", ignore_index=-100)
            / count
        )
        loss.backward()
        total += float(loss.detach())
    return total


def fast_loss(model: Transformer, docs: list[Document]) -> tuple[float, dict[str, Tensor]]:
    optimizer = AdamW(model, Settings())
    row = pack(docs)
    loss, _ = batch_loss(model, row, 1.0 / len(row.targets))
    loss.backward()
    return float(loss.detach()), {name: optimizer.window(optimizer.grads, name) for name in optimizer.spans}


def relative(a: Tensor, b: Tensor | None) -> float:
    assert b is not None
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("completion_only", [False, True], ids=["all", "completion"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_packed_loss_and_gradients_equal_each_document_alone(
    base: Path, completion_only: bool, checkpointing: bool
) -> None:
    docs, model, reference = documents(completion_only), Transformer.load(base).train(), theirs(base)
    model.set_dropout(0.0)
    model.gradient_checkpointing = checkpointing
    loss, grads = fast_loss(model, docs)
    assert abs(loss / plain_loss(reference, docs) - 1) < 1e-5
    wanted = dict(reference.named_parameters())
    assert max(relative(grad, wanted[name].grad) for name, grad in grads.items()) < 1e-5
    assert grads.keys() == wanted.keys()


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], ["all-linear"]])
@pytest.mark.parametrize("completion_only", [False, True], ids=["all", "completion"])
def test_packed_lora_equals_peft_on_each_document_alone(
    base: Path, completion_only: bool, targets: list[str], variant: dict[str, Any]
) -> None:
    import peft

    docs, model, reference = documents(completion_only), Transformer.load(base).train(), theirs(base)
    model.set_dropout(0.0)
    model.add_lora(4, 8.0, 0.0, targets, **variant)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        **variant,
    )
    reference = peft.get_peft_model(reference, config)
    rng = torch.Generator().manual_seed(3)
    matching = {
        name.replace("base_model.model.", "").replace(".default", ""): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.1)
                matching[name].copy_(p)
    loss, grads = fast_loss(model, docs)
    assert abs(loss / plain_loss(reference, docs) - 1) < 1e-5
    assert grads.keys() == matching.keys()
    assert max(relative(grad, matching[name].grad) for name, grad in grads.items()) < 1e-5


def test_gradients_of_micro_batches_add_up_to_those_of_one_row(base: Path) -> None:
    docs = documents(completion_only=False)
    whole, parts = Transformer.load(base).eval(), Transformer.load(base).eval()  # no dropout
    _, wanted = fast_loss(whole, docs)
    optimizer = AdamW(parts, Settings())
    count = sum(len(pack([d]).targets) for d in docs)
    for subset in (docs[:2], docs[2:3], docs[3:]):
        batch_loss(parts, pack(subset), 1.0 / count)[0].backward()
    assert max(relative(optimizer.window(optimizer.grads, n), g) for n, g in wanted.items()) < 1e-5


def test_a_token_of_one_document_does_not_change_the_states_of_another(base: Path) -> None:
    model = Transformer.load(base).eval()
    docs = documents(completion_only=False)
    changed = [*docs[:2], (docs[2][0][::-1].copy(), docs[2][1]), *docs[3:]]
    start, end = pack(docs).bounds[2]
    with torch.no_grad():
        before, after = (model.hidden(pack(d), all_tokens=True) for d in (docs, changed))
    others = [i for i in range(len(before)) if not start <= i < end]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[start:end], after[start:end])


def test_the_fused_head_equals_plain_losses_gradients_and_hits() -> None:
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(700, 24, generator=rng, requires_grad=True)  # more than one block of tokens
    w = torch.randn(VOCAB, 24, generator=rng, requires_grad=True)
    y = torch.randint(0, VOCAB, (700,), generator=rng)
    with torch.no_grad():
        y[:300] = (h @ w.t()).argmax(1)[:300]
    loss, hits = kernels.head_loss(h, y, w, 1 / 700)
    loss.backward()
    dh, dw = h.grad, kernels.main_grad(w)
    h.grad = None
    plain = F.cross_entropy(h @ w.t(), y)
    plain.backward()
    assert abs(float(loss.detach()) - float(plain.detach())) < 1e-5
    assert int(hits) == int(((h @ w.t()).argmax(1) == y).sum())
    assert dh is not None
    assert h.grad is not None
    assert w.grad is not None
    assert relative(dh, h.grad) < 1e-5
    assert relative(dw, w.grad) < 1e-5


def test_the_fused_head_is_exact_for_confident_predictions() -> None:
    h = torch.eye(8).mul(8).requires_grad_()
    w = torch.eye(8).requires_grad_()
    y = torch.arange(8)
    loss, _ = kernels.head_loss(h, y, w, 1 / 8)
    loss.backward()
    wanted = torch.autograd.grad(F.cross_entropy(h.double() @ w.double().t(), y), h)[0]
    assert h.grad is not None
    assert relative(h.grad, wanted) < 1e-4


def test_dropout_keeps_the_right_fraction() -> None:
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.9):
        kept = kernels.keep_mask((1000, 201), p).float()
        assert abs(float(kept.mean()) - (1 - p)) < 0.005
        # no correlation along the rows, although four decisions share one random number
        assert float(kept.mean(0).std()) < 0.03
    x = torch.ones(1000, 200, requires_grad=True)
    y = kernels.dropout(x, 0.1)
    y.sum().backward()
    assert float(y.detach().mean()) == pytest.approx(1, abs=0.005)
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers_for_every_architecture(size: str, tmp_path: Path) -> None:
    """The layers and heads of each size, but narrower (head size 16 instead of 64), so that the test is fast."""
    layers, heads = SIZES[size]
    model = Transformer.new(
        gpt2_config(vocab_size=400, n_positions=64, n_embd=heads * 16, n_layer=layers, n_head=heads), seed=4
    ).eval()
    model.save(tmp_path)
    ids = np.random.default_rng(0).integers(0, 400, 50)
    row = pack([(ids.astype(np.int32), np.ones(50, np.uint8))])
    with torch.no_grad():
        ours = model.hidden(row, all_tokens=True) @ model.head().t()
        wanted = theirs(tmp_path).eval()(torch.from_numpy(ids)[None]).logits[0]
    assert float((ours - wanted).abs().max()) < 1e-4


def test_transformers_loads_our_files_with_no_missing_or_unexpected_key(base: Path) -> None:
    import transformers

    auto: Any = transformers.GPT2LMHeadModel
    _, info = auto.from_pretrained(str(base), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_we_load_files_without_the_prefix_as_on_the_hub(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    without_prefix = {name.removeprefix("transformer."): t for name, t in weights.items()}
    save_file(without_prefix | {"h.0.attn.bias": torch.ones(1, 1, 128, 128)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    ours = Transformer.load(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items())


def test_evaluation_counts_losses_hits_and_exact_answers(base: Path) -> None:
    model = Transformer.load(base).eval()
    docs = documents(completion_only=True)
    examples = Examples.of(_Encoded(ids.tolist(), mask.tolist()) for ids, mask in docs)
    result = evaluate(model, examples, 64, torch.device("cpu"))
    with torch.no_grad():
        wanted = sum(float(batch_loss(model, pack([d]), 1.0)[0]) for d in docs)
    assert result.loss == pytest.approx(wanted / examples.trained_tokens, rel=1e-5)
    assert result.examples == len(docs)
    assert result.exact_match == 0.0


class _Encoded:
    def __init__(self, ids: list[int], mask: list[int]) -> None:
        self.ids, self.mask = ids, mask


def test_the_flat_optimizer_takes_the_steps_of_torchs_adamw(base: Path) -> None:
    settings = Settings(weight_decay=0.1, clip_norm=0.5, beta2=0.95)
    ours, plain = Transformer.load(base).eval(), Transformer.load(base)
    optimizer = AdamW(ours, settings)
    decayed = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for p in plain.parameters():
        p.data = p.data.clone()
    row = pack(documents(completion_only=False))
    for step in range(3):
        optimizer.zero_grad()
        batch_loss(ours, row, 1.0 / len(row.targets))[0].backward()
        for name, p in plain.named_parameters():
            p.grad = optimizer.window(optimizer.grads, name).clone()
        optimizer.step(1e-3 * (step + 1), optimizer.grad_norm())
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        reference.step()
    wanted = plain.state_dict()
    assert max(relative(t, wanted[name]) for name, t in ours.state_dict().items()) < 1e-5


def test_a_frozen_model_keeps_no_inputs_of_its_layers(base: Path) -> None:
    """With LoRA only the activations that the adapters need are kept for the backward pass."""
    kept = [_saved_bytes(base, lora) for lora in (False, True)]
    assert kept[1] < 0.75 * kept[0]


def _saved_bytes(base: Path, lora: bool) -> int:
    model = Transformer.load(base).train()
    model.set_dropout(0.0)
    if lora:
        model.add_lora(4, 8.0, 0.0, None)
    row, seen = pack(documents(completion_only=False)), dict[int, Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        model.hidden(row)
    return sum(t.numel() * t.element_size() for t in seen.values())
