"""Exported folders: transformers and peft open them, and they equal the trained model bit for bit."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.training.running import Runner, of
from tests.training.tiny import END, gpt2, write_model
from training.export import command, export_check, folder
from training.models.causal_lm import CausalLM
from training.models.load import load_model
from training.models.transformer import Transformer
from training.plan.events import Failure
from training.text.tokenizer import Tokenizer

IDS = list(range(3, 30))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_model(tmp_path_factory.mktemp("base"))
    (home / "LICENSE").write_text("Do as you like.")
    return home


def adapted(base: Path, use_dora: bool = False) -> Transformer:
    """The base model with adapters that are no longer in their initial state."""
    model = Transformer.load(base).eval()
    model.add_lora(4, 8.0, 0.0, ["c_attn", "c_fc"], seed=1, use_dora=use_dora, use_rslora=use_dora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def theirs(folder: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    lm, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return lm.eval()


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([IDS])).logits[0]


def test_an_exported_model_is_read_back_bit_for_bit(base, tmp_path):
    model = gpt2(seed=5)
    folder.write_folder(model, tmp_path / "out", base=base)
    verdict = folder.verify(model, tmp_path / "out", base=base)
    assert verdict["exact"]
    assert verdict["max_difference"] == 0
    assert verdict["logits"] > 1000


def test_a_changed_weight_in_an_export_is_detected(base, tmp_path):
    model = gpt2(seed=5)
    folder.write_folder(model, tmp_path / "out", base=base)
    other = Transformer.load(tmp_path / "out")
    with torch.no_grad():
        other.head()[40, 3] += 1e-3
    other.save(tmp_path / "out")
    assert not folder.verify(model, tmp_path / "out", base=base)["exact"]


def test_transformers_opens_an_export_with_no_missing_or_unexpected_key(base, tmp_path):
    model = gpt2(seed=5)
    folder.write_folder(model, tmp_path / "out", base=base)
    torch.testing.assert_close(
        logits(theirs(tmp_path / "out")), export_check.logits_of(model, IDS), rtol=1e-4, atol=1e-4
    )


def test_an_export_includes_tokenizer_and_chat_template(base, tmp_path):
    folder.write_folder(gpt2(), tmp_path / "out", base=base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ours = Tokenizer.load(base)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == ours.render_chat(messages)
    assert tokenizer("the cat sat")["input_ids"] == ours.encode("the cat sat")
    assert tokenizer.eos_token == END


def test_a_half_precision_folder_is_close_and_half_as_large(base, tmp_path):
    model = gpt2(seed=5)
    whole = folder.write_folder(model, tmp_path / "fp32", base=base)
    half = folder.write_folder(model, tmp_path / "fp16", base=base, dtype="fp16")
    verdict = folder.verify(model, tmp_path / "fp16", base=base)
    assert (verdict["close"], verdict["exact"], verdict["dtype"]) == (True, False, "float16")
    sizes = [next(f["bytes"] for f in files if f["name"] == "model.safetensors") for files in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    theirs(tmp_path / "fp16")


def test_adapters_are_merged(base, tmp_path):
    model = adapted(base)
    folder.write_folder(model, tmp_path / "out", base=base, format="merged")
    assert folder.verify(model, tmp_path / "out", base=base)["exact"]
    torch.testing.assert_close(
        logits(theirs(tmp_path / "out")), export_check.logits_of(model, IDS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-dora", "llama"])
def test_peft_opens_an_adapter(base, tmp_path, kind):
    if kind != "llama":
        model: Any = adapted(base, use_dora=kind == "gpt2-dora")
    else:
        shape = {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        write_model(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        config = transformers.LlamaConfig(**shape, initializer_range=0.2)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        base, model = tmp_path / "base", CausalLM.load(tmp_path / "base").eval()
        model.add_lora(4, 8.0, 0.0, None, seed=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
    files = folder.write_folder(
        model, tmp_path / "out", base=base, format="adapter", details={"base": str(base)}
    )
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {f["name"] for f in files}
    read = peft.PeftModel.from_pretrained(theirs(base), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(read), export_check.logits_of(model, IDS), rtol=1e-4, atol=1e-4)
    assert folder.verify(model, tmp_path / "out", base=base, format="adapter")["close"]


def test_a_fully_fine_tuned_model_has_no_adapter_to_export(base, tmp_path):
    with pytest.raises(Failure, match="no adapter"):
        folder.write_folder(gpt2(), tmp_path / "out", base=base, format="adapter")
    assert not list(tmp_path.iterdir())


def test_the_list_of_files_matches_the_folder(base, tmp_path):
    files = folder.write_folder(gpt2(), tmp_path / "out", base=base)
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert listed == files
    assert {f["name"] for f in files} | {"manifest.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    for f in files:
        content = (tmp_path / "out" / f["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (f["bytes"], f["sha256"])


def test_a_failed_export_leaves_the_old_folder(base, tmp_path, monkeypatch):
    folder.write_folder(gpt2(seed=1), tmp_path / "out", base=base)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(folder, "write_tokenizer", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        folder.write_folder(gpt2(seed=2), tmp_path / "out", base=base)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_model_card_describes_the_run(base, tmp_path):
    details = {
        "base": "gpt2",
        "name": "Orders",
        "examples": 480,
        "settings": {"learning_rate": 3e-4},
        "metrics": {"loss": 1.25},
        "licence": "mit",
        "fidelity": {"exact": True, "logits": 10},
    }
    folder.write_folder(gpt2(), tmp_path / "out", base=base, details=details)
    text = (tmp_path / "out" / "README.md").read_text()
    for piece in (
        'base_model: "gpt2"',
        'license: "mit"',
        "# Orders",
        "480 examples",
        "| learning_rate | 0.0003 |",
        "bit-for-bit equal",
    ):
        assert piece in text
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_the_command_line_exports_a_folder(base, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--checkpoint", str(base), "--to", str(tmp_path / "out"), "--dtype", "fp16"])
    assert command.main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fidelity"]["close"]
    assert load_model(tmp_path / "out").layers == 2


@pytest.mark.parametrize(
    ("method", "format"), [("full", "safetensors"), ("lora", "merged"), ("lora", "adapter")]
)
def test_a_checkpoint_is_exported_as_the_run_itself_exports_it(tmp_path, method, format):
    events = Runner(tmp_path, steps=3, method=method).train()
    last = of(events, "checkpoint")[-1]["path"]
    model, base, details = command.load_trained(Path(last), None)
    folder.write_folder(model.eval(), tmp_path / "out", base=base, format=format, details=details)
    verdict = folder.verify(
        load_model(tmp_path / "work" / "final"), tmp_path / "out", base=base, format=format
    )
    assert verdict["close"]
    assert verdict["exact"] == (format != "adapter")


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    last = Path(of(Runner(tmp_path, steps=2).train(), "checkpoint")[-1]["path"])
    content = bytearray((last / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (last / "weights.safetensors").write_bytes(content)
    with pytest.raises(Failure, match="cannot be used"):
        command.load_trained(last, None)
