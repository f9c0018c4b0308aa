"""Converts a GGUF file, the format of llama.cpp, to a Hugging Face model folder.

transformers reads the weights and the vocabulary. It says nothing of what it leaves out, so that is checked here: how
text is split before the merges, control tokens that are not one token, scaled positions, tensors without a place. What
would make a model that only seems to work is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from training.plan.events import Failure

MAGIC = b"GGUF"
CONTROL = 3  # the type of special tokens

# How byte-level vocabularies split text, beside those that transformers knows: names of
# `tokenizer.ggml.pre` as in llama.cpp's llama-vocab.cpp.
LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # also splits between digits


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a Hugging Face folder: safetensors (bf16 if the file has bf16, otherwise
    fp32), config.json, generation_config.json, the tokenizer and its chat template. `folder` may exist.
    Raises Failure("base_model") if the file is broken or cannot be converted faithfully."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise Failure("base_model", f"{file.name} is not a GGUF file.")
        # In a folder of its own, because transformers also reads other files beside a GGUF file.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            _convert(Path(alone), file.name, folder)
    except Failure:
        raise
    # A broken file can fail anywhere in two libraries, with any error of theirs.
    except Exception as error:
        raise Failure("base_model", f"The GGUF file {file.name} cannot be read: {error}") from error


def _convert(source: Path, name: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # late: takes seconds
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    path = str(source / "model.gguf")
    metadata, tensors = read_gguf_metadata(path, ("tokenizer.ggml.tokens",))
    architecture = metadata["general.architecture"]
    if architecture not in {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS}:
        raise Failure(
            "base_model",
            f"The GGUF file {name} has a model of the architecture {architecture}, which is not supported.",
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.startswith("rope_") for tensor in tensors):
        raise Failure(
            "base_model",
            f"The GGUF file {name} scales the positions of its context (RoPE scaling), which is lost in the conversion. "
            "Use the model's Hugging Face folder instead.",
        )
    tokenizer = _tokenizer(source, name, metadata)
    bf16 = GgufHeader.from_file(path).dtype is torch.bfloat16
    arguments: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    config = AutoConfig.from_pretrained(source, **arguments)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        output_loading_info=True,
        **arguments,
    )
    model, read = loaded
    if missing := sorted(read["missing_keys"]):
        raise Failure("base_model", f"The GGUF file {name} lacks weights of its model, such as {missing[0]}.")
    model.hf_quantizer = None  # it would not save; the weights are plain numbers now
    del model.config.quantization_config
    model.config.__dict__.pop("_model_name_or_path", None)  # a title, of no use here
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)) or None,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(source: Path, name: str, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer as transformers reads it, with what it does not know of splits and named templates."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file="model.gguf")
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split in SINGLE_DIGITS:
            parts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        elif split in LIKE_GPT2:
            tokenizer.backend_tokenizer.pre_tokenizer = byte_level
        else:
            raise Failure(
                "base_model",
                f"The GGUF file {name} splits text in a way that is not known (tokenizer.ggml.pre: {split}). "
                "Use the model's Hugging Face folder instead.",
            )
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", ())
    for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == CONTROL and tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids != [
            token_id
        ]:
            raise Failure(
                "base_model",
                f"The control token {token} of the GGUF file {name} would be cut into pieces. "
                "Use the model's Hugging Face folder instead.",
            )
    prefix = "tokenizer.chat_template."
    if named := {key.removeprefix(prefix): text for key, text in metadata.items() if key.startswith(prefix)}:
        tokenizer.chat_template = {"default": tokenizer.chat_template, **named}
    return tokenizer
