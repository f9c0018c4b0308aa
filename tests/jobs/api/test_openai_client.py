"""The published `openai` client, with only its address and key changed, drives everything; and all it is told fits the
client's own types."""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.jobs.api.conftest import client_of, rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("studio")]
T = TypeVar("T")
_trained: dict[str, str] = {}  # one job for all tests here: its id, once it has succeeded


def checked(answer: T) -> T:
    """The client builds its objects without looking; this looks."""
    data = answer.to_dict(mode="json")  # type: ignore[attr-defined]
    if data.get("status") == "paused":  # OpenAI's own example, which its own type does not list
        data["status"] = "queued"
    type(answer).model_validate(data)  # type: ignore[attr-defined]
    return answer


def until(look: Callable[[], T], holds: Callable[[T], bool], seconds: float = 120) -> T:
    deadline = time.monotonic() + seconds
    while not holds(result := look()):
        assert time.monotonic() < deadline, result
        time.sleep(0.3)
    return result


def settled(client: openai.OpenAI, job_id: str, *wanted: str) -> FineTuningJob:
    wanted = wanted or ("succeeded", "failed", "cancelled")
    return until(lambda: client.fine_tuning.jobs.retrieve(job_id), lambda job: job.status in wanted)


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("train.jsonl", rows()), purpose="fine-tune").id


@pytest.fixture
def job(client: openai.OpenAI) -> FineTuningJob:
    """A succeeded job, trained once for all."""
    if not _trained:
        file = client.files.create(file=("train.jsonl", rows()), purpose="fine-tune")
        made = checked(
            client.fine_tuning.jobs.create(
                model="starter",
                training_file=file.id,
                suffix="colours",
                seed=7,
                metadata={"team": "blue"},
                method={
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
                },
                extra_body={
                    "llmtuner": {
                        "checkpoint_every_steps": 2,
                        "validation_fraction": 0.2,
                        "sequence_length": 64,
                    }
                },
            )
        )
        assert made.status in {"validating_files", "queued"}
        ended = settled(client, made.id)
        assert ended.status == "succeeded", ended.to_dict()
        _trained["id"] = made.id
    return client.fine_tuning.jobs.retrieve(_trained["id"])


@pytest.fixture
def model(client: openai.OpenAI, job: FineTuningJob) -> str:
    assert job.fine_tuned_model
    until(lambda: [m.id for m in client.models.list()], lambda ids: job.fine_tuned_model in ids)
    return job.fine_tuned_model


def test_a_tuned_model_is_tuned_again(
    client: openai.OpenAI, bobs_client: openai.OpenAI, model: str, file_id: str
):
    again = checked(client.fine_tuning.jobs.create(model=model, training_file=file_id))
    assert again.model == model
    client.fine_tuning.jobs.cancel(again.id)
    bobs = bobs_client.files.create(file=("train.jsonl", rows()), purpose="fine-tune").id
    payload = []
    for name in (model, model[:-2] + "~~"):
        with pytest.raises(openai.BadRequestError) as refused:
            bobs_client.fine_tuning.jobs.create(model=name, training_file=bobs)
        payload.append(refused.value.message.replace(name, "…"))
    assert payload[0] == payload[1]


# ---- files -------------------------------------------------------------------------------------


def test_a_file_goes_up_is_checked_comes_back_and_goes_away(client: openai.OpenAI):
    file = checked(client.files.create(file=("train.jsonl", rows()), purpose="fine-tune"))
    assert (file.bytes, file.filename, file.purpose) == (len(rows()), "train.jsonl", "fine-tune")
    ready = until(lambda: checked(client.files.retrieve(file.id)), lambda f: f.status != "uploaded")
    assert ready.status == "processed"
    assert ready.to_dict()["llmtuner"]["summary"]
    assert client.files.content(file.id).read() == rows()
    assert file.id in [checked(f).id for f in client.files.list(purpose="fine-tune")]
    assert client.files.list(order="asc", limit=1).data[0].id <= file.id
    assert checked(client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_file_is_kept_as_long_as_asked(client: openai.OpenAI, people: Any):
    wish: Any = {"anchor": "created_at", "seconds": 3600}
    file = checked(client.files.create(file=("t.jsonl", rows()), purpose="fine-tune", expires_after=wish))
    assert file.expires_at is not None
    assert abs(file.expires_at - file.created_at - 3600) <= 5
    upload = client.uploads.upload_file_chunked(
        file=rows(), filename="t.jsonl", bytes=len(rows()), mime_type="application/jsonl", purpose="fine-tune"
    )
    assert upload.file is not None
    assert upload.file.expires_at is None
    for wrong in ({"anchor": "created_at", "seconds": 60}, {"anchor": "never", "seconds": 3600}):
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("t.jsonl", rows()), purpose="fine-tune", expires_after=wrong)  # type: ignore[arg-type]
    begun = client.uploads.create(
        bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune", expires_after=wish
    )
    part = client.uploads.parts.create(begun.id, data=b"abc")
    done = client.uploads.complete(begun.id, part_ids=[part.id])
    assert done.file is not None
    assert done.file.expires_at


def test_files_are_paged_by_the_client_itself(client: openai.OpenAI):
    ids = [client.files.create(file=("p.jsonl", rows(3 + n)), purpose="fine-tune").id for n in range(5)]
    listed = [file.id for file in client.files.list(limit=2)]
    assert [id for id in listed if id in ids] == ids[::-1]
    assert len(listed) == len(set(listed))
    first = client.files.list(limit=2)
    assert first.has_more
    assert len(first.data) == 2


def test_a_broken_file_says_which_line(client: openai.OpenAI):
    file = client.files.create(file=("bad.jsonl", b'{"messages": [}\n' * 3), purpose="fine-tune")
    looked = until(lambda: checked(client.files.retrieve(file.id)), lambda f: f.status != "uploaded")
    assert looked.status == "error"
    assert "1" in (looked.status_details or "")


def test_a_file_in_parts_with_its_md5(client: openai.OpenAI):
    data = rows(200)
    upload = checked(
        client.uploads.upload_file_chunked(
            file=data,
            filename="parts.jsonl",
            bytes=len(data),
            mime_type="application/jsonl",
            purpose="fine-tune",
            part_size=4096,
            md5=hashlib.md5(data).hexdigest(),
        )
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == data


def test_parts_count_in_the_order_given_and_what_is_wrong_is_refused(client: openai.OpenAI):
    upload = checked(
        client.uploads.create(bytes=6, filename="a.txt", mime_type="text/plain", purpose="fine-tune")
    )
    second = checked(client.uploads.parts.create(upload.id, data=b"def"))
    first = checked(client.uploads.parts.create(upload.id, data=b"abc"))
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5="0" * 32)
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[first.id, first.id])
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"x" * 100)
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"abcdef"
    again = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert again.file is not None
    assert again.file.id == done.file.id


def test_an_upload_can_be_given_up(client: openai.OpenAI):
    upload = client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune")
    assert checked(client.uploads.cancel(upload.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"abc")


# ---- jobs --------------------------------------------------------------------------------------


def test_a_job_trains_and_tells_of_itself_in_openais_words(client: openai.OpenAI, job: FineTuningJob):
    checked(job)
    assert job.status == "succeeded"
    assert job.model == "starter"
    assert job.seed == 7
    assert job.metadata == {"team": "blue"}
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == 8
    assert job.fine_tuned_model
    assert job.fine_tuned_model.startswith("ft:starter:")
    assert ":colours:" in job.fine_tuned_model
    assert job.trained_tokens
    assert job.finished_at
    extras = job.to_dict()["llmtuner"]
    assert extras["settings"]["sequence_length"] == 64
    assert extras["plan"]["settings"]["learning_rate"] > 0


def test_jobs_are_listed_and_filtered(client: openai.OpenAI, job: FineTuningJob):
    assert job.id in [checked(result).id for result in client.fine_tuning.jobs.list(limit=1)]
    blue = list(client.fine_tuning.jobs.list(metadata={"team": "blue"}))
    assert job.id in [result.id for result in blue]
    assert all((result.metadata or {})["team"] == "blue" for result in blue)
    assert not client.fine_tuning.jobs.list(metadata={"team": "red"}).data


def test_events_page_from_the_latest_to_the_first(client: openai.OpenAI, job: FineTuningJob):
    events = [checked(event) for event in client.fine_tuning.jobs.list_events(job.id, limit=3)]
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == list(range(max(numbers), 0, -1))
    metrics = [event for event in events if event.type == "metrics"]
    assert any("train_loss" in (event.to_dict()["data"]) for event in metrics)
    assert all(event.message for event in events)


def test_events_stream_until_the_end(client: openai.OpenAI, job: FineTuningJob):
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=1000)]
    with client.fine_tuning.jobs.with_streaming_response.list_events(
        job.id, extra_query={"stream": "true"}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) - 1 == len(listed)


def test_checkpoints_are_listed_and_generate(client: openai.OpenAI, job: FineTuningJob, model: str):
    result = [checked(checkpoint) for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert result
    assert [c.step_number for c in result] == sorted((c.step_number for c in result), reverse=True)
    assert result[0].fine_tuned_model_checkpoint == model  # the last step's is the model itself
    assert result[1:]
    assert all(c.fine_tuned_model_checkpoint == f"{model}:ckpt-step-{c.step_number}" for c in result[1:])
    name = result[1].fine_tuned_model_checkpoint
    assert checked(client.models.retrieve(name)).id == name
    answer = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "colour 1?"}], max_tokens=4, temperature=0
    )
    assert checked(answer).choices[0].finish_reason in {"stop", "length"}


def test_the_result_file_is_a_table_of_the_curve(client: openai.OpenAI, job: FineTuningJob):
    (file_id,) = job.result_files
    file = checked(client.files.retrieve(file_id))
    content = client.files.content(file_id).read()
    assert (file.purpose, file.bytes) == ("fine-tune-results", len(content))
    table = list(csv.DictReader(io.StringIO(content.decode())))
    assert {"step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"} == set(
        table[0]
    )
    assert [float(row["train_loss"]) for row in table if row["train_loss"]]
    assert [float(row["valid_loss"]) for row in table if row["valid_loss"]]
    assert file_id in [f.id for f in client.files.list(purpose="fine-tune-results")]


def test_a_job_is_paused_resumed_and_cancelled(client: openai.OpenAI, file_id: str):
    made = client.fine_tuning.jobs.create(
        model="starter",
        training_file=file_id,
        hyperparameters={"n_epochs": 50, "batch_size": 1},
        extra_body={"llmtuner": {"sequence_length": 64, "validation_fraction": 0}},
    )
    settled(client, made.id, "running")
    client.fine_tuning.jobs.pause(made.id)
    assert checked(settled(client, made.id, "paused")).status == "paused"
    assert checked(client.fine_tuning.jobs.resume(made.id)).status in {
        "validating_files",
        "queued",
        "running",
    }
    assert checked(client.fine_tuning.jobs.cancel(made.id)).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(made.id)


def test_a_submission_sent_twice_is_one_job(client: openai.OpenAI, file_id: str):
    def create(**options: Any) -> FineTuningJob:
        return client.fine_tuning.jobs.create(model="starter", training_file=file_id, **options)

    made = {create(suffix="twice").id for _ in range(3)}
    made |= {create(suffix="keyed", extra_headers={"Idempotency-Key": "k-1"}).id for _ in range(3)}
    assert len(made) == 2
    with pytest.raises(openai.BadRequestError, match="another request"):
        create(suffix="other", extra_headers={"Idempotency-Key": "k-1"})
    for job_id in made:
        assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    again = create(suffix="twice")
    assert again.id not in made  # after its end the same wish is a new one
    client.fine_tuning.jobs.cancel(again.id)


# ---- models and generation ---------------------------------------------------------------------

ASK: Any = [{"role": "system", "content": "Name a colour."}, {"role": "user", "content": "colour 3?"}]


def test_models_are_listed_and_described(client: openai.OpenAI, model: str):
    listed = [checked(result).id for result in client.models.list()]
    assert {"starter", "gpt2", model} <= set(listed)
    assert checked(client.models.retrieve(model)).id == model
    assert checked(client.models.retrieve("starter")).owned_by == "llmtuner"


def test_a_model_answers_to_the_name_it_had_at_openai(
    web: Any, people: Any, client: openai.OpenAI, model: str
):
    from jobs.registry import tuned_models

    old = "ft:gpt-4o-mini-2024-07-18:acme::9abcDEFg"
    tuned_models.set_aliases(people["alice"].owner, model, [old])
    assert checked(client.models.retrieve(old)).id == old
    options: Any = {"messages": ASK, "max_tokens": 8, "temperature": 0}
    answer = checked(client.chat.completions.create(model=old, **options))
    assert answer.model == old
    assert (
        answer.choices[0].message == client.chat.completions.create(model=model, **options).choices[0].message
    )
    with pytest.raises(openai.NotFoundError):
        client_of(web.url, people["bob"].key).chat.completions.create(model=old, **options)
    tuned_models.set_aliases(people["alice"].owner, model, [])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(old)


def test_chat_answers_whole_and_streamed_alike(client: openai.OpenAI, model: str):
    options: Any = {"model": model, "messages": ASK, "max_tokens": 8, "temperature": 0}
    whole = checked(client.chat.completions.create(**options))
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        checked(chunk)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_seed_makes_sampling_repeat_itself(client: openai.OpenAI, model: str):
    def sample(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=model, messages=ASK, max_tokens=8, temperature=1.5, seed=seed, n=3
        )
        return [choice.message.content for choice in checked(answer).choices]

    assert sample(1) == sample(1)
    assert len({*sample(1), *sample(2), *sample(3)}) > 1


def test_chat_tells_log_probabilities(client: openai.OpenAI, model: str):
    answer = checked(
        client.chat.completions.create(
            model=model, messages=ASK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
        )
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert max(top.logprob for top in token.top_logprobs) == pytest.approx(token.logprob)


def test_completions_with_log_probabilities_stop_and_echo(client: openai.OpenAI, model: str):
    options: Any = {"model": model, "prompt": "The colour is", "max_tokens": 8, "temperature": 0}
    plain = checked(client.completions.create(**options))
    assert plain.choices[0].text
    payload = checked(client.completions.create(**options, logprobs=2)).choices[0]
    assert payload.text == plain.choices[0].text
    assert payload.logprobs is not None
    assert payload.logprobs.tokens
    assert (
        len(payload.logprobs.tokens)
        == len(payload.logprobs.token_logprobs or [])
        == len(payload.logprobs.top_logprobs or [])
    )
    echoed = client.completions.create(**options, echo=True).choices[0]
    assert echoed.text == "The colour is" + plain.choices[0].text
    cut = plain.choices[0].text.strip()[1:3]
    stopped = client.completions.create(**options, stop=[cut]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.choices[0].text[: plain.choices[0].text.index(cut)]
    streamed = "".join(
        c.choices[0].text for c in client.completions.create(**options, stream=True) if c.choices
    )
    assert streamed == plain.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused_for_good(client: openai.OpenAI, stream: bool):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="starter", prompt="colour " * 600, stream=stream)
    assert refusal.value.code == "context_length_exceeded"


def test_many_prompts_and_choices_are_numbered_through(client: openai.OpenAI, model: str):
    answer = checked(client.completions.create(model=model, prompt=["One", "Two"], n=2, max_tokens=3, seed=1))
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 4


def test_a_person_who_leaves_frees_the_place(client: openai.OpenAI, model: str):
    for _ in range(6):  # more than may run at once: without freeing the last ones would be refused
        stream = client.completions.create(model="starter", prompt="Once", max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        time.sleep(0.5)
    client.completions.create(model="starter", prompt="Once", max_tokens=1)


def test_a_base_by_openais_name_is_refused_with_the_way_out(client: openai.OpenAI, file_id: str):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file_id)
    assert "starter" in str(refusal.value)
    assert "BASE_MODEL_ALIASES" in str(refusal.value)
    assert refusal.value.param == "model"


async def test_the_async_client_does_the_same(web: Any, people: Any, model: str):
    async with openai.AsyncOpenAI(
        base_url=f"{web.url}/v1", api_key=people["alice"].key, max_retries=0
    ) as client:
        assert model in [checked(result).id async for result in client.models.list()]
        stream = await client.chat.completions.create(model=model, messages=ASK, max_tokens=4, stream=True)
        assert [checked(chunk) async for chunk in stream][-1].choices[0].finish_reason
        files = [file.id async for file in client.files.list(limit=2)]
        assert files
        jobs = [checked(job).id async for job in client.fine_tuning.jobs.list(limit=1)]
        assert jobs
        with pytest.raises(openai.NotFoundError):
            await client.fine_tuning.jobs.retrieve("ftjob-0000")


def test_a_tuned_model_is_deleted_and_then_gone(web: Any, people: Any, client: openai.OpenAI, model: str):
    with pytest.raises(openai.NotFoundError):
        client_of(web.url, people["bob"].key).models.delete(model)
    deleted = checked(client.models.delete(model))
    assert (deleted.id, deleted.deleted) == (model, True)
    _trained.clear()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(model)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=model, messages=ASK)
