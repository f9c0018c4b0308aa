"""What a folder, a zip file or a GGUF file must have to become a base model. Each refusal says why."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.training import tiny
from training.models.import_base import import_model
from training.plan.events import Failure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two layers and random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.write_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_folder_becomes_a_base_with_only_the_files_that_it_needs(folder, tmp_path):
    source = copied(folder, tmp_path)
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    model = import_model(source, tmp_path / "base")
    assert (model["architecture"], model["layers"], model["context"]) == ("llama", 2, 128)
    assert model["licence"] == "apache-2.0"
    assert model["parameters"] == sum(
        w.numel() for w in load_file(tmp_path / "base" / "model.safetensors").values()
    )
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("inside", ["", "tiny-llama/"])
def test_a_zip_file_is_read_like_a_folder(folder, tmp_path, inside):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, inside + file.name)
        archive.writestr("../outside.json", "{}")
        archive.writestr(f"{inside}../LICENSE", "outside")
    import_model(path, tmp_path / "to" / "base")
    assert (tmp_path / "to" / "base" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert [entry.name for entry in (tmp_path / "to").iterdir()] == ["base"]


def config_with(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "config.json", values)


def tokenizer_with(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "tokenizer.json", values)


def weights_with(**values: torch.Tensor | None) -> Callable[[Path], object]:
    """Weights with other tensors, or without some; `__` in a name stands for a dot."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name, value in values.items():
            weights.pop(name.replace("__", "."), None)
            if value is not None:
                weights[name.replace("__", ".")] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def header(text: bytes, size: int | None = None) -> Callable[[Path], object]:
    length = (len(text) if size is None else size).to_bytes(8, "little")
    return lambda folder: (folder / "model.safetensors").write_bytes(length + text + bytes(16))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def text_of(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


HUGE = b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}'
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "../../secret.safetensors"}})
Q_PROJ = "model__layers__0__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (only_pickles, "no safetensors weights, only pytorch_model.bin, a format that can execute code"),
        (config_with(auto_map={"AutoModelForCausalLM": "modeling.Tiny"}), "needs custom code"),
        (config_with(model_type="rwkv9"), "has no causal language model of the type 'rwkv9'"),
        (config_with(architectures=["BertModel"]), "not a causal language model"),
        (config_with(quantization_config={"quant_method": "gptq"}), "quantized"),
        (text_of("config.json", "[" * 100_000), "config.json"),
        (config_with(num_hidden_layers=3), "9 of the model's weights are missing"),
        (weights_with(**{Q_PROJ: None}), "are missing, for example model.layers.0.self_attn.q_proj.weight"),
        (weights_with(**{Q_PROJ: torch.zeros(5, 5)}), "do not have the shape"),
        (header(b"{}", 2**62), "not a valid safetensors file: .*header too large"),
        (header(HUGE), "not a valid safetensors file: .*overflow"),
        (header(b"[" * 100_000), "not a valid safetensors file"),
        (text_of("model.safetensors.index.json", INDEX), "names a file that is not in the folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (text_of("tokenizer.json", "[" * 100_000), "tokenizer cannot be used"),
        (tokenizer_with(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}), "tokens up to"),
        (
            tokenizer_with(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "(" * 5000},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
            "tokenizer cannot be used",
        ),
        (text_of("chat_template.jinja", "{{ messages[0].content.no.attribute }}"), "chat template"),
    ],
)
def test_an_unsuitable_model_is_refused_with_its_reason(folder, tmp_path, change, reason):
    source = copied(folder, tmp_path)
    change(source)
    with pytest.raises(Failure, match=reason) as refusal:
        import_model(source, tmp_path / "base")
    assert str(tmp_path) not in str(refusal.value)


def test_a_model_larger_than_the_limit_is_refused(folder, tmp_path):
    with pytest.raises(Failure, match="limit is 1,000"):
        import_model(folder, tmp_path / "base", 1000)


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + b"\xff" * 1000, b"not one", b""])
def test_a_broken_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(Failure, match="GGUF file"):
        import_model(tmp_path / "model.gguf", tmp_path / "base")


def test_a_damaged_zip_file_is_refused(folder, tmp_path):
    path = Path(shutil.make_archive(str(tmp_path / "model"), "zip", folder))
    content = bytearray(path.read_bytes())
    content[2000:3000] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(Failure, match="cannot be"):
        import_model(path, tmp_path / "base")


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "source"))


def edit(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
