"""A tuned model ends its answers by itself, however the base's chat template ends a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.training.ending_models import CASES, PROMPTS, Case, answer_to, tune, write_rows
from tests.training.serving.test_serve import Server
from training.models.generate import GenerateOptions, generate, prompt_ids
from training.models.load import load_model
from training.text.encode import EncodingOptions, examples
from training.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=CASES)
def tuned(request: pytest.FixtureRequest) -> tuple[Case, Path, Path]:
    """The case, its base, and the exported model."""
    return tune(request.param)


def test_generation_ends_by_itself(tuned: tuple[Case, Path, Path]) -> None:
    _, _, folder = tuned
    tokenizer, model = Tokenizer.load(folder), load_model(folder)
    ended = []
    for prompt in PROMPTS:
        ids = prompt_ids([{"role": "user", "content": prompt}], tokenizer)
        options = GenerateOptions(max_tokens=40, stop=tokenizer.ends.texts)
        [completion] = generate(model, tokenizer, ids, options)
        ended.append(completion.finish_reason == "stop" and completion.text.strip() == answer_to(prompt))
    assert sum(ended) >= 19


def test_the_server_ends_answers_by_itself(tuned: tuple[Case, Path, Path]) -> None:
    _, _, folder = tuned
    server = Server()
    ended = []
    for prompt in PROMPTS:
        lines = server.generate_text(
            model=str(folder), messages=[{"role": "user", "content": prompt}], max_tokens=40
        )
        text = "".join(line["text"] for line in lines if line["t"] == "token")
        ended.append((lines[-1]["choices"][0]["finish_reason"], text.strip()) == ("stop", answer_to(prompt)))
    server.process.kill()
    server.process.wait()
    assert sum(ended) >= 19


def test_transformers_ends_answers_of_the_export(tuned: tuple[Case, Path, Path]) -> None:
    case, _, folder = tuned
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    assert {*([ends] if isinstance(ends, int) else ends)} == {*tokenizer.convert_tokens_to_ids([*case.ends])}
    ended = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        written = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0][len(ids) :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        ended.append(len(written) < 40 and text.strip() == answer_to(prompt) + case.shown_by_transformers)
    assert sum(ended) >= 19


def test_the_last_trained_token_is_an_end(tuned: tuple[Case, Path, Path], tmp_path: Path) -> None:
    _, base, _ = tuned
    tokenizer = Tokenizer.load(base)
    for example in examples(write_rows(tmp_path / "rows.jsonl"), tokenizer, EncodingOptions()):
        assert example.mask[-1] == 1
        assert example.ids[-1] in tokenizer.ends.ids
