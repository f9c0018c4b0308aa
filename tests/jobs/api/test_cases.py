"""Every small file of tests/training/data/cases through `/v1/files`: processed or an error, with the report's
words."""

from __future__ import annotations

from functools import partial

import openai
import pytest

from tests.jobs.api.test_openai_client import validated, wait_for
from tests.training.data.test_cases import CASES, FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("studio")]


def test_each_file_is_processed_or_gets_an_error(client: openai.OpenAI) -> None:
    sent = {
        name: client.files.create(file=(name, (FOLDER / name).read_bytes()), purpose="fine-tune").id
        for name in CASES
    }
    for name, case in CASES.items():
        retrieve = partial(client.files.retrieve, sent[name])
        file = validated(wait_for(retrieve, lambda file: file.status != "uploaded"))
        assert file.status == ("processed" if case.ready else "error"), name
        if not case.ready:
            assert case.words in (file.status_details or ""), name
        else:
            summary = file.llmtuner["summary"]  # type: ignore[attr-defined]
            assert (summary["rows"], summary["trained_tokens"]) == (case.rows, case.trained), name
            assert case.words in summary["verdict"], name
    for name, words in (
        ("10b_long_prompt.jsonl", "Every answer is cut off"),
        ("23_dpo.jsonl", "Training on pairs is not supported"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            client.fine_tuning.jobs.create(model="starter", training_file=sent[name])
        assert refused.value.param == "training_file"
