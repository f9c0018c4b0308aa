"""Every way `/v1` says no, as the official client sees it: its class, its code, the parameter it names."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from django.conf import settings
from django.core.cache import cache
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.test.client import encode_multipart

from jobs.api import uploads
from llmtuner import body_limit
from tests.jobs.api.conftest import Person, client_of, rows

pytestmark = pytest.mark.usefixtures("web")
ASK: Any = [{"role": "user", "content": "hello"}]


def test_a_wrong_key_is_an_authentication_error(web: Any, people: dict[str, Person]):
    for key in ("sk-llmt-wrong", people["alice"].key[:-1] + "x", people["alice"].expired, "sk-" + "a" * 5000):
        with pytest.raises(openai.AuthenticationError) as refusal:
            client_of(web.url, key).models.list()
        assert refusal.value.code == "invalid_api_key"
        assert refusal.value.request_id


def test_a_revoked_key_is_refused_at_once(web: Any, people: dict[str, Person]):
    from accounts import api_keys

    key, secret = api_keys.create(people["alice"].user, "short", ["read"])
    client = client_of(web.url, secret)
    client.models.list()
    api_keys.revoke(people["alice"].user, key.pk)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_does_only_what_its_scopes_say(web: Any, people: dict[str, Person]):
    reader = client_of(web.url, people["alice"].reader)
    reader.models.list()
    for call in (
        lambda: reader.files.create(file=("a.jsonl", rows()), purpose="fine-tune"),
        lambda: reader.models.delete("starter"),
        lambda: reader.chat.completions.create(model="starter", messages=ASK),
    ):
        with pytest.raises(openai.PermissionDeniedError) as refusal:
            call()
        assert refusal.value.code == "insufficient_scope"


def test_keys_are_stored_nowhere_in_the_clear(people: dict[str, Person], folder: Any):
    from accounts.models import ApiKey

    dumped = json.dumps([str(row) for row in ApiKey.objects.values()])
    secrets = [people["alice"].key, people["alice"].reader, people["bob"].key]
    assert not [secret for secret in secrets if secret in dumped]
    assert files_with(folder, people["alice"].email)  # it would be found
    for secret in secrets:
        assert not files_with(folder, secret[-24:])


def files_with(folder: Any, words: str) -> str:
    """In a process of its own: whoever closes SQLite's file loses its locks, and with them the database."""
    result = subprocess.run(["grep", "-rlF", "-e", words, str(folder)], capture_output=True, text=True)
    return result.stdout


def test_two_different_credentials_are_refused(web: Any, people: dict[str, Person]):
    client = client_of(web.url, people["alice"].key, default_headers={"x-api-key": people["bob"].key})
    with pytest.raises(openai.BadRequestError, match="one credential"):
        client.models.list()


def test_what_is_not_there_is_not_found(client: openai.OpenAI):
    for call in (
        lambda: client.files.retrieve("file-none"),
        lambda: client.files.content("file-results-01HZZZZZZZZZZZZZZZZZZZZZZZ"),
        lambda: client.fine_tuning.jobs.retrieve("ftjob-none"),
        lambda: client.fine_tuning.jobs.cancel("ftjob-none"),
        lambda: client.fine_tuning.jobs.list_events("ftjob-none"),
        lambda: client.fine_tuning.jobs.checkpoints.list("ftjob-none"),
        lambda: client.models.retrieve("ft:none:a:b:c"),
        lambda: client.models.delete("ft:none:a:b:c:ckpt-step-3"),
        lambda: client.chat.completions.create(model="ft:none:a:b:c", messages=ASK),
        lambda: client.chat.completions.create(model="ft:none:a:b:c", messages=ASK, stream=True),
        lambda: client.completions.create(model="none-such", prompt="x"),
        lambda: client.uploads.cancel("upload-none"),
        lambda: client.get("/nothing/here", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError) as refusal:
            call()
        assert refusal.value.body
        assert refusal.value.request_id


WRONG_CHAT: dict[str, dict[str, Any]] = {
    "messages": {"messages": []},
    "temperature": {"temperature": 9},
    "top_p": {"top_p": 1.5},
    "n": {"n": 100},
    "max_tokens": {"max_tokens": 10**9},
    "max_completion_tokens": {"max_completion_tokens": 0},
    "stop": {"stop": ["x"] * 1000},
    "seed": {"seed": 2**70},
    "top_logprobs": {"top_logprobs": 3},
    "logit_bias": {"logit_bias": {str(i): 1 for i in range(50_000)}},
    "presence_penalty": {"presence_penalty": 1.5},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "response_format": {"response_format": {"type": "json_object"}},
    "stream_options": {"stream_options": {"include_usage": True}},
    "llmtuner": {"extra_body": {"llmtuner": {"beams": 4}}},
    "llmtuner.top_k": {"extra_body": {"llmtuner": {"top_k": -1}}},
}


@pytest.mark.parametrize("param", WRONG_CHAT)
def test_a_wrong_request_for_text_names_the_parameter(param: str, client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**{"model": "starter", "messages": ASK, **WRONG_CHAT[param]})
    assert (refusal.value.param or "").startswith(param)


WRONG_JOB: dict[str, dict[str, Any]] = {
    "model": {"model": "gpt-5"},
    "training_file": {"training_file": "file-none"},
    "validation_file": {"validation_file": "file-none"},
    "suffix": {"suffix": "x" * 65},
    "seed": {"seed": -1},
    "metadata": {"metadata": {str(i): "x" for i in range(17)}},
    "hyperparameters.n_epochs": {"hyperparameters": {"n_epochs": 10**9}},
    "hyperparameters.batch_size": {"hyperparameters": {"batch_size": 0}},
    "hyperparameters.learning_rate_multiplier": {"hyperparameters": {"learning_rate_multiplier": -1}},
    "hyperparameters.epochs": {"hyperparameters": {"epochs": 3}},
    "method.type": {"method": {"type": "dpo", "dpo": {}}},
    "integrations": {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
    "llmtuner.learning_rate": {"extra_body": {"llmtuner": {"learning_rate": -1}}},
    "llmtuner.sequence_length": {"extra_body": {"llmtuner": {"sequence_length": 10**9}}},
    "llmtuner.owner": {"extra_body": {"llmtuner": {"owner": "user-BOB"}}},
    "llmtuner.prompts": {"extra_body": {"llmtuner": {"prompts": "not a list"}}},
}


@pytest.mark.parametrize("param", WRONG_JOB)
def test_a_wrong_job_names_the_parameter(param: str, client: openai.OpenAI):
    file = client.files.create(file=("a.jsonl", rows()), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.create(**{"model": "starter", "training_file": file.id, **WRONG_JOB[param]})
    assert refusal.value.param == param
    assert refusal.value.body


def test_fields_that_are_nobodys_to_set_are_ignored(client: openai.OpenAI, people: dict[str, Person]):
    file = client.files.create(file=("a.jsonl", rows()), purpose="fine-tune")
    forced = {
        "owner": people["bob"].owner,
        "status": "succeeded",
        "epoch": 9,
        "is_staff": True,
        "id": "ftjob-mine",
    }
    job = client.fine_tuning.jobs.create(model="starter", training_file=file.id, extra_body=forced)
    assert job.id != "ftjob-mine"
    assert job.status in {"validating_files", "queued"}
    assert job.organization_id == people["alice"].owner
    client.fine_tuning.jobs.cancel(job.id)


def test_a_file_of_somebody_else_is_no_training_file(client: openai.OpenAI, bobs_client: openai.OpenAI):
    file = bobs_client.files.create(file=("b.jsonl", rows()), purpose="fine-tune")
    told = []
    for id in (file.id, "file-01HZZZZZZZZZZZZZZZZZZZZZZZ"):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.fine_tuning.jobs.create(model="starter", training_file=id)
        told.append(refusal.value.body)
    assert told[0] == told[1]


def test_too_many_requests_are_a_rate_limit_error(client: openai.OpenAI, people: dict[str, Person]):
    window = int(time.time() // 60)
    keys = [f"v1:{people['alice'].owner}:{window + n}" for n in (0, 1)]
    try:
        cache.set_many(dict.fromkeys(keys, 10**6), 120)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.models.list()
        assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 60
    finally:
        cache.delete_many(keys)


def raw(
    url: str, body: bytes, key: str, kind: str = "application/json", **headers: str
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url,
        data=body,
        method="POST",
        headers={"Authorization": f"Bearer {key}", "Content-Type": kind, **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"x"',
        b'{"model": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff",
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"",
    ],
)
def test_broken_bodies_are_bad_requests(body: bytes, web: Any, people: dict[str, Person]):
    status, told = raw(f"{web.url}/v1/chat/completions", body, people["alice"].key)
    assert status == 400
    assert told["error"]["type"] == "invalid_request_error"


def test_a_huge_body_is_refused_before_it_is_sent(web: Any, people: dict[str, Person]):
    host, port = web.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as s:
        s.sendall(f"{head}Content-Length: 104857600\r\n\r\n".encode())
        assert b" 413 " in s.recv(4096)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as s:
        s.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for _ in range(200):  # 12.8 MB; it stops listening after 4
                s.sendall(piece)
        except OSError:
            pass
        else:
            s.sendall(b"0\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it may hang up while we are still talking
            assert b" 413 " in s.recv(4096)
    assert client_of(web.url, people["alice"].key).models.list().data


def test_nobody_opens_uploads_without_end(client: openai.OpenAI):
    def begin() -> Any:
        return client.uploads.create(bytes=3, filename="a.txt", mime_type="text/plain", purpose="fine-tune")

    opened = []
    with pytest.raises(openai.RateLimitError) as refusal:  # noqa: PT012  which one is refused is the question
        for _ in range(uploads.MAX_OPEN + 1):
            opened.append(begin())
    assert refusal.value.code == "quota_exceeded"
    for upload in opened:
        client.uploads.cancel(upload.id)
    client.uploads.cancel(begin().id)


@pytest.mark.parametrize("address", ["/v1/files", "/datasets/upload/", "/v1/uploads/upload-1/parts"])
@pytest.mark.parametrize("length", ["Content-Length: 104857600", "Transfer-Encoding: chunked"])
def test_a_strangers_file_is_refused_unread(address: str, length: str, web: Any, people: dict[str, Person]):
    host, port = web.url.removeprefix("http://").split(":")
    head = (
        f"POST {address} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    )
    head += f"Authorization: Bearer {people['alice'].expired}\r\nCookie: session=none\r\n"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as s:
        s.sendall(f"{head}{length}\r\n\r\n".encode())
        assert s.recv(4096).split()[1] in (b"401", b"413")


def test_one_person_sends_a_few_files_at_once(web: Any, people: dict[str, Person]):
    host, port = web.url.removeprefix("http://").split(":")
    most = settings.JOBS["max_uploads_per_owner"]

    def begin(person: Person, stack: contextlib.ExitStack) -> socket.socket:
        head = f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {person.key}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 104857600\r\n\r\n"
        s = stack.enter_context(socket.create_connection(("127.0.0.1", int(port)), timeout=2))
        s.sendall(head.encode() + b"--b\r\n")
        return s

    with contextlib.ExitStack() as stack:
        for _ in range(most):
            with pytest.raises(TimeoutError):  # it waits for the rest
                begin(people["alice"], stack).recv(1)
        assert begin(people["alice"], stack).recv(4096).split()[1] == b"429"
        with pytest.raises(TimeoutError):
            begin(people["bob"], stack).recv(1)
    time.sleep(0.5)  # all have hung up
    with contextlib.ExitStack() as stack, pytest.raises(TimeoutError):
        begin(people["alice"], stack).recv(1)


def test_a_place_is_free_once_the_answer_is_there(web: Any, people: dict[str, Person]):
    """As many lanes as places, each sending its next part the moment the last one is answered."""
    page, part = Client(), bytes(body_limit.MAX_BODY + 1)  # a large one just so
    page.force_login(people["alice"].user)
    headers = {"Cookie": f"session={page.cookies['session'].value}"}

    def lane(_: int) -> set[int]:
        answers = set()
        for _ in range(15):
            connection = http.client.HTTPConnection("127.0.0.1", int(web.url.rsplit(":", 1)[1]), timeout=30)
            connection.request("PUT", "/datasets/uploads/upload-1/parts/1/", part, headers)
            answers.add(connection.getresponse().status)
            connection.close()
        return answers

    with ThreadPoolExecutor(settings.JOBS["max_uploads_per_owner"]) as lanes:
        assert set().union(*lanes.map(lane, range(settings.JOBS["max_uploads_per_owner"]))) == {403}


def test_a_large_file_of_somebody_known_is_taken(client: openai.OpenAI, web: Any, people: dict[str, Person]):
    data = rows(100_000)
    assert len(data) > body_limit.MAX_BODY
    file = client.files.create(file=("large.jsonl", data), purpose="fine-tune")
    assert file.bytes == len(data)
    client.files.delete(file.id)

    page = Client()
    page.force_login(people["alice"].user)
    form = encode_multipart("b", {"file": SimpleUploadedFile("large.jsonl", data)})
    headers = {
        "Content-Type": "multipart/form-data; boundary=b",
        "Cookie": f"session={page.cookies['session'].value}",
    }
    asked = urllib.request.Request(f"{web.url}/datasets/upload/", form, headers, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(asked, timeout=20)
    assert refusal.value.code == 403  # read to its end, where the form's token is missing


def test_a_session_cookie_opens_nothing(web: Any, people: dict[str, Person]):
    from django.conf import settings

    from tests.jobs.api.test_tokens import session_of

    cookie = f"{settings.SESSION_COOKIE_NAME}={session_of(people['alice'].user).session_key}"
    request = urllib.request.Request(f"{web.url}/v1/models", headers={"Cookie": cookie})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)
    assert refusal.value.code == 401


def test_the_docs_page_needs_no_network_and_no_script(web: Any):
    with urllib.request.urlopen(f"{web.url}/v1/docs", timeout=20) as answer:
        page = answer.read().decode()
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "/v1/fine_tuning/jobs" in page
    assert "http://cdn" not in page
    assert "https://cdn" not in page
    with urllib.request.urlopen(f"{web.url}/v1/openapi.json", timeout=20) as answer:
        document = json.loads(answer.read())
    assert len(document["paths"]) >= 18


def test_our_webhooks_are_ones_that_the_client_unwraps():
    from jobs.notifications import webhooks
    from jobs.store.tables import Job, WebhookDelivery

    job = Job("user-A", "ftjob-01HZZZZZZZZZZZZZZZZZZZZZZZ", status="succeeded", ended_at=time.time())
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = {
        "id": "evt-1",
        "object": "event",
        "type": "fine_tuning.job.succeeded",
        "created_at": int(job.ended_at),
    }
    delivery = WebhookDelivery("user-A", "d#1", payload=json.dumps(body | {"data": {"id": job.job_id}}))
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    event: Any = client.webhooks.unwrap(delivery.payload, webhooks.signed(secret, delivery))
    assert event.type == "fine_tuning.job.succeeded"
    assert event.data.id == job.job_id
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(delivery.payload + " ", webhooks.signed(secret, delivery))


def test_webhooks_are_added_listed_and_removed(client: openai.OpenAI, bobs_client: openai.OpenAI):
    made = client.webhooks.create(
        name="ends", url="https://hooks.example.com/in", event_types=["fine_tuning.job.succeeded"]
    )
    assert made.signing_secret.startswith("whsec_")
    result = client.webhooks.retrieve(made.id)
    assert (result.url, result.event_types) == (made.url, ["fine_tuning.job.succeeded"])
    assert made.id in [hook.id for hook in client.webhooks.list()]
    with pytest.raises(openai.NotFoundError):
        bobs_client.webhooks.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        bobs_client.webhooks.delete(made.id)
    for wrong in (
        {"url": "ftp://x"},
        {"url": "https://user:pw@x.example"},
        {"event_types": ["batch.completed"]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.webhooks.create(
                **{
                    "name": "n",
                    "url": "https://x.example",
                    "event_types": ["fine_tuning.job.failed"],
                    **wrong,
                }
            )
    assert client.webhooks.delete(made.id).deleted
