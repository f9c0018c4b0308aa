"""GGUF files become model folders with the same weights, tokens and ends, or are refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from tests.training.tiny import END, backend
from training.models.gguf import convert_gguf
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
LAYERS, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 32
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TURN = "<|turn|>"  # a control token of its own


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary().get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.4,  # large enough that the output depends on positions
    )
    return transformers.LlamaForCausalLM(config).eval()


def vocabulary() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(backend())
    tokenizer.add_special_tokens([TURN])
    return tokenizer


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The weights under GGUF's names. Rows of queries and keys are in llama.cpp's order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if part in name:
                rows, columns = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, columns)
                values = halves.swapaxes(1, 2).reshape(rows, columns)
        yield str(names.get_name(name, try_suffixes=(".weight",))), values


def write(path: Path, *, architecture: str = "llama", split: str = "gpt-2", **more: str) -> Path:
    """A tiny Llama. `more`: further texts of the metadata."""
    model, tokenizer = llama(), vocabulary()
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    control = (END, TURN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token in control else 1 for token, _ in vocab])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend())["model"]["merges"]])
    ids = dict(vocab)
    writer.add_bos_token_id(ids[END])
    writer.add_eos_token_id(ids[END])
    writer.add_eot_token_id(ids[TURN])
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, text in more.items():
        writer.add_string(key, text)
    for name, values in tensors(model):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf")


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    to = file.parent / "model"
    convert_gguf(file, to)
    return to


def test_the_weights_are_those_of_the_file(folder: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = llama()(ids).logits
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        actual = loaded(ids).logits
    assert torch.allclose(actual, expected, atol=1e-4)


def test_the_tokens_and_ends_are_those_of_the_file(folder: Path) -> None:
    tokenizer, original = Tokenizer.load(folder), vocabulary()
    for text in ("the cat sat at 12.5, don't", "naïve café, 猫", f"mat{TURN}moon"):
        assert tokenizer.encode_template(text) == original.encode(text).ids
    end, turn = original.token_to_id(END), original.token_to_id(TURN)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (end, None)
    assert set(tokenizer.ends.ids) == {end, turn}
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == f"<user>Hi{END}"


def test_splits_that_transformers_does_not_know_are_kept(tmp_path: Path) -> None:
    convert_gguf(write(tmp_path / "a.gguf", split="smollm"), tmp_path / "a")
    tokenizer = Tokenizer.load(tmp_path / "a")
    before = tokenizer.backend.pre_tokenizer.pre_tokenize_str("in 2026")
    assert [part for part, _ in before] == ["in", "Ġ", "2", "0", "2", "6"]


def test_what_cannot_be_kept_is_refused(tmp_path: Path, file: Path) -> None:
    whole = file.read_bytes()
    cases = {
        "is not a GGUF file": b"GGML" + whole[4:],
        "cannot be read": whole[: len(whole) // 2],
        "architecture wooden": write(tmp_path / "w", architecture="wooden").read_bytes(),
        r"splits text in a way that is not known \(tokenizer.ggml.pre: mine\)": write(
            tmp_path / "s", split="mine"
        ).read_bytes(),
        "RoPE scaling": write(tmp_path / "r", **{"llama.rope.scaling.type": "linear"}).read_bytes(),
    }
    for reason, content in cases.items():
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(Failure, match=reason) as failed:
            convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
        assert failed.value.reason == "base_model"
    with pytest.raises(Failure, match="cannot be read"):
        convert_gguf(tmp_path / "missing.gguf", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_chat_model_of_the_set_up_is_the_published_one() -> None:
    folder = ROOT / ".tools" / "smollm2"
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}], True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.ends.tokens == ("<|im_end|>",)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(
        torch.tensor([tokenizer.encode_template(prompt)]), max_new_tokens=16, do_sample=False
    )
    assert tokenizer.decode(answer[0].tolist(), False) == prompt + "The capital of France is Paris.<|im_end|>"
