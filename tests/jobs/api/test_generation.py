"""Completions and chats, as OpenAI answers them: each parameter is honoured, refused by name, or ignored as documented."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jobs.api import parameters
from jobs.api.schemas import generation as schemas
from jobs.registry import tuned_models
from jobs.store import blobs, tables
from jobs.store.tables import TunedModel
from tests.jobs.api.conftest import Person
from tests.services import ROOT
from training.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
STARTER = ROOT / "training/starter/model"
ASK: Any = [{"role": "user", "content": "colour?"}]
PROMPT = "A lamp is"


@pytest.fixture(scope="module")
def generating(web: Any) -> Iterator[Any]:
    """Web and one inference worker."""
    web.start_worker("inference")
    yield web
    web.stop("inference")


@pytest.fixture
def asking(generating: Any, client: openai.OpenAI) -> openai.OpenAI:
    """Alice's client, and a worker that answers it."""
    return client


def written(client: openai.OpenAI, **options: Any) -> str:
    answer = client.completions.create(
        **{"model": "starter", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    )
    return answer.choices[0].text


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_table_of_parameters():
    text = (ROOT / "docs/api.md").read_text()
    shown = re.search(r"<!-- parameters -->\n(.*?)\n<!-- /parameters -->", text, re.DOTALL)
    assert shown, "docs/api.md has no section for the parameters"
    assert shown[1] == parameters.as_markdown()


@pytest.mark.parametrize(
    ("place", "schema"),
    [
        ("chat", schemas.ChatCreate),
        ("completions", schemas.CompletionCreate),
        ("message", schemas.Message),
    ],
)
def test_the_table_honours_what_the_schema_reads(place: str, schema: Any):
    assert parameters.names(place, "supported") == set(schema.model_fields)


REFUSED: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "web_search_options": {},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "guided_json": {"type": "object"},
    "guided_choice": ["a", "b"],
    "structured_outputs": {"json": {}},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "logit_bias": {"50256": -100},
    "beams": 4,  # nobody knows what it is meant to change
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
def test_what_would_change_the_answer_is_refused_by_name(web: Any, client: openai.OpenAI, endpoint, name):
    what = {"messages": ASK} if endpoint.startswith("chat") else {"prompt": PROMPT}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.post(f"/{endpoint}", cast_to=object, body={"model": "starter", **what, name: REFUSED[name]})
    assert refusal.value.param == name
    assert name in refusal.value.message


def test_every_refused_parameter_is_tried_or_has_no_value_that_would_be_taken(client: openai.OpenAI):
    for name in parameters.names("chat", "refused") - set(REFUSED):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.post(
                "/chat/completions",
                cast_to=object,
                body={"model": "starter", "messages": ASK, name: "something"},
            )
        assert refusal.value.param == name


def test_what_changes_nothing_is_ignored_and_so_is_what_asks_for_nothing(asking: openai.OpenAI):
    harmless: dict[str, Any] = {
        "user": "u-1",
        "safety_identifier": "s",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
    }
    assert set(harmless) <= parameters.names("chat", "ignored")
    neutral = {
        name: row.neutral[0]
        for (place, name), row in parameters.ROWS.items()
        if place == "chat" and row.neutral
    }
    unset = dict.fromkeys(parameters.names("chat", "refused"))
    answer = asking.chat.completions.create(
        model="starter", messages=ASK, max_tokens=2, extra_body={**unset, **neutral, **harmless}
    )
    assert answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages.1.content"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, "messages.1.content"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}, "messages.1.tool_calls"),
        ({"role": "tool", "content": "4", "tool_call_id": "c"}, "messages.1.role"),
        ({"role": "function", "content": "4", "name": "f"}, "messages.1.role"),
        ({"role": "user", "content": "x", "name": "bob"}, "messages.1.name"),
        ({"role": "user", "content": "x", "mood": "good"}, "messages.1.mood"),
    ],
)
def test_a_history_that_cannot_be_read_is_refused_by_the_place(client: openai.OpenAI, message, param):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="starter", messages=[*ASK, message])
    assert refusal.value.param == param
    assert "messages.1" in refusal.value.message
    assert "valid" not in refusal.value.message  # a sentence, and not pydantic's words


def test_a_models_own_answer_can_be_sent_back(asking: openai.OpenAI):
    first = asking.chat.completions.create(model="starter", messages=ASK, max_tokens=3)
    history = [*ASK, first.choices[0].message.model_dump(), {"role": "user", "content": "And?", "name": None}]
    assert asking.chat.completions.create(model="starter", messages=history, max_tokens=2).choices


def test_top_k_min_p_and_the_repetition_penalty_are_honoured(asking: openai.OpenAI):
    greedy = written(asking, max_tokens=30)
    hot = {"max_tokens": 30, "temperature": 2, "seed": 5}
    assert written(asking, **hot) != greedy
    assert written(asking, **hot, extra_body={"top_k": 1}) == greedy
    assert written(asking, **hot, extra_body={"min_p": 1.0}) == greedy
    assert written(asking, max_tokens=30, extra_body={"repetition_penalty": 2.0}) != greedy
    for name, wrong in (("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0)):
        with pytest.raises(openai.BadRequestError) as refusal:
            written(asking, extra_body={name: wrong})
        assert (refusal.value.param or "").startswith(name)


# ---- completions -----------------------------------------------------------------------------------------------------


def test_prompts_of_token_ids_are_read_as_they_are(asking: openai.OpenAI):
    tokenizer = Tokenizer.load(STARTER)
    ids = tokenizer.encode(PROMPT)
    assert written(asking, prompt=ids) == written(asking)
    answer = asking.completions.create(
        model="starter", prompt=[ids, tokenizer.encode("The dog")], max_tokens=8, temperature=0, echo=True
    )
    assert [choice.text for choice in answer.choices] == [
        PROMPT + written(asking, max_tokens=8),
        "The dog" + written(asking, prompt="The dog", max_tokens=8),
    ]
    for wrong in ([[1, 2], []], [1, "a"], [[1], "a"], [], [10**6], [-1]):
        with pytest.raises(openai.BadRequestError) as refusal:
            asking.completions.create(model="starter", prompt=wrong)
        assert (refusal.value.param or "prompt").startswith("prompt")


def test_128_prompts_are_answered_at_once(asking: openai.OpenAI):
    prompts = [f"The {i} dogs" for i in range(128)]
    answer = asking.completions.create(model="starter", prompt=prompts, max_tokens=3, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(128))
    for i in (0, 17, 127):
        assert answer.choices[i].text == written(asking, prompt=prompts[i], max_tokens=3)
    assert answer.usage
    assert answer.usage.prompt_tokens == sum(len(Tokenizer.load(STARTER).encode(text)) for text in prompts)
    with pytest.raises(openai.BadRequestError) as refusal:
        asking.completions.create(model="starter", prompt=["x"] * 129)
    assert refusal.value.param == "prompt"
    streamed: dict[int, str] = {}
    for chunk in asking.completions.create(
        model="starter", prompt=prompts[:9], max_tokens=3, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {i: answer.choices[i].text for i in range(9)}


def test_a_prompt_is_scored_without_writing(asking: openai.OpenAI):
    answer = asking.completions.create(
        model="starter", prompt=[PROMPT, "The dog"], max_tokens=0, echo=True, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == [PROMPT, "The dog"]
    for choice in answer.choices:
        assert choice.logprobs
        scores = choice.logprobs.token_logprobs or []
        assert scores[0] is None  # type: ignore[comparison-overlap]  # as OpenAI has it
        assert all(score < 0 for score in scores[1:])
        assert choice.finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 0


def test_values_that_ask_for_nothing_are_taken(asking: openai.OpenAI):
    greedy = written(asking)
    assert written(asking, temperature=1, top_p=0) == greedy
    assert written(asking, stop="") == greedy
    assert written(asking, stop=["", ""]) == greedy
    chat = asking.chat.completions.create
    assert chat(model="starter", messages=ASK, max_tokens=2, top_logprobs=0).choices[0].logprobs is None
    scored = chat(model="starter", messages=ASK, max_tokens=2, logprobs=True, top_logprobs=0).choices[0]
    assert scored.logprobs
    assert [token.top_logprobs for token in scored.logprobs.content or []] == [[], []]


# ---- what cannot be answered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_in_openais_words(asking: openai.OpenAI, stream: bool):
    long = "colour " * 900
    calls: dict[str, Any] = {
        "prompt": lambda: asking.completions.create(model="starter", prompt=long, stream=stream),
        "messages": lambda: asking.chat.completions.create(
            model="starter", messages=[{"role": "user", "content": long}], stream=stream
        ),
    }
    for param, call in calls.items():
        with pytest.raises(openai.BadRequestError) as refusal:
            call()
        assert refusal.value.code == "context_length_exceeded"
        assert refusal.value.param == param
        assert re.search(r"This model's maximum context length is \d+ tokens\.", refusal.value.message)


def make_model(person: Person, name: str, *, truncate: str = "") -> str:
    """A tuned model that is the starter; of the file `truncate` only a half is stored."""
    model = TunedModel(person.owner, f"ft:starter:{name}::12345678", name=name, base="starter", method="full")
    model.prefix, model.files = f"models/{name}", []
    for path in sorted(STARTER.iterdir()):
        content = path.read_bytes()
        stored = content[: len(content) // 2] if path.name == truncate else content
        blobs.put_file(f"{model.prefix}/{path.name}", [stored])
        entry = {
            "name": path.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        model.files.append(entry)
    tables.put_new(model)
    return str(model.model_id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_model_is_damaged_for_good(
    asking: openai.OpenAI, people: dict[str, Person], stream: bool
):
    model = make_model(people["alice"], f"cut-{stream}", truncate="model.safetensors")
    with pytest.raises(openai.BadRequestError, match="damaged") as refusal:  # which no client sends again
        asking.chat.completions.create(model=model, messages=ASK, stream=stream)
    assert refusal.value.code == "model_damaged"
    assert "Try again" not in refusal.value.message


def test_a_copy_that_was_damaged_on_this_disk_is_fetched_again(
    asking: openai.OpenAI, people: dict[str, Person]
):
    model = make_model(people["alice"], "mended")
    weights = tuned_models.fetch(tuned_models.get_for(people["alice"].owner, model)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(openai.BadRequestError, match="damaged"):
        written(asking, model=model)
    assert written(asking, model=model) == written(asking)
