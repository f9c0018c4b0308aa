"""Models: the list, a model's page, the zip download, and the playground form."""

from __future__ import annotations

import io
import zipfile

import pytest
from django.template.loader import render_to_string
from django.test import AsyncClient, Client
from django.urls import reverse
from django.utils.html import escape

from accounts.models import User
from jobs.forms import GenerateForm
from jobs.registry import tuned_models
from jobs.store import access
from jobs.views.playground import shown_text
from tests.jobs.views.makers import make_job, make_model, page_text


def test_every_page_of_a_model_tuned_from_the_hub_opens(alices: Client, alice: User) -> None:
    """Its ID contains a slash, like all names on the Hub."""
    model = make_model(alice.owner_id, root="acme/tiny")
    page = reverse("jobs:model", args=[model.model_id])
    assert page in alices.get(reverse("jobs:models")).content.decode()
    assert model.model_id in alices.get(page).content.decode()
    job = make_job(alice.owner_id, "succeeded", model_id=model.model_id)
    assert page in alices.get(reverse("jobs:job", args=[job.job_id])).content.decode()
    assert alices.get(reverse("jobs:download_model", args=[model.model_id])).status_code == 200
    alices.post(reverse("jobs:model_names", args=[model.model_id]), {"aliases": "ft:gpt-4o:acme::abc"})
    assert b"ft:gpt-4o:acme::abc" in alices.get(page).content
    alices.post(reverse("jobs:delete_model", args=[model.model_id]))
    assert alices.get(page).status_code == 404


def test_an_empty_list_explains_where_models_come_from(alices: Client) -> None:
    assert "Your fine-tuned models will appear here" in alices.get(reverse("jobs:models")).content.decode()


def test_a_model_page_shows_metrics_files_and_a_playground(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    text = alices.get(reverse("jobs:model", args=[model.model_id])).content.decode()
    for part in (
        model.model_id,
        "1.250",
        "93%",
        "model.safetensors",
        model.files[1]["sha256"],
        "Generate",
    ):
        assert part in text


@pytest.mark.django_db(transaction=True)
async def test_the_zip_contains_every_file_and_is_streamed(alice: User) -> None:
    client = AsyncClient()
    await client.aforce_login(alice, backend="allauth.account.auth_backends.AuthenticationBackend")
    model = make_model(alice.owner_id)
    response = await client.get(reverse("jobs:download_model", args=[model.model_id]))
    assert response.is_async
    assert response["Content-Type"] == "application/zip"
    content = b"".join([part async for part in response.streaming_content])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        assert archive.read(names["model.safetensors"]) == b"weights" * 1000


OPENAI_NAME = "ft:gpt-4o-mini-2024-07-18:acme::9abcDEFg"


def test_a_model_can_have_an_openai_name_as_its_alias(alices: Client, alice: User, bob: User) -> None:
    model, other = make_model(alice.owner_id), make_model(alice.owner_id)
    names = reverse("jobs:model_names", args=[model.model_id])
    response = alices.post(names, {"aliases": f"{OPENAI_NAME}\n{OPENAI_NAME}"}, follow=True)
    assert f"The model can now also be used as {OPENAI_NAME}." in response.content.decode()
    assert tuned_models.get_for(alice.owner_id, OPENAI_NAME).model_id == model.model_id
    with pytest.raises(access.NotFound):
        tuned_models.get_for(bob.owner_id, OPENAI_NAME)
    taken = alices.post(
        reverse("jobs:model_names", args=[other.model_id]), {"aliases": OPENAI_NAME}, follow=True
    )
    assert f"is already an alias of {model.model_id}" in taken.content.decode()
    alices.post(names, {"aliases": ""})
    with pytest.raises(access.NotFound):
        tuned_models.get_for(alice.owner_id, OPENAI_NAME)


@pytest.mark.parametrize(
    "names",
    [
        "gpt2",
        "starter",
        "ft:",
        "ft:a/b",
        "ft:../../etc",
        "ft:" + "a" * 300,
        " ".join(f"ft:a:{n}" for n in range(9)),
    ],
)
def test_an_alias_not_in_openais_format_is_rejected(alices: Client, alice: User, names: str) -> None:
    model = make_model(alice.owner_id)
    alices.post(reverse("jobs:model_names", args=[model.model_id]), {"aliases": names})
    assert not tuned_models.get_for(alice.owner_id, model.model_id).aliases


def test_a_model_can_be_deleted(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    response = alices.post(reverse("jobs:delete_model", args=[model.model_id]), follow=True)
    assert "The model and its files were deleted." in response.content.decode()
    assert alices.get(reverse("jobs:model", args=[model.model_id])).status_code == 404


def test_the_playground_lists_own_models_and_the_starter(alices: Client, alice: User) -> None:
    model = make_model(alice.owner_id)
    text = alices.get(
        reverse("jobs:playground"), {"model": model.model_id, "prompt": "Hello"}
    ).content.decode()
    assert f'value="{model.model_id}" data-base="starter" selected' in text
    assert 'value="starter"' in text
    assert ">Hello</textarea>" in text


@pytest.mark.parametrize(
    ("kind", "mode", "words"),
    [
        ("chat", "chat", "Conversations"),
        ("completion", "prompt", "Prompts and completions"),
        ("text", "prompt", "Plain text"),
        ("", "prompt", ""),
    ],
)
def test_the_playground_speaks_as_the_model_was_trained(
    alices: Client, alice: User, kind: str, mode: str, words: str
) -> None:
    model = make_model(alice.owner_id, trained_on=kind)
    pages = (
        reverse("jobs:model", args=[model.model_id]),
        f"{reverse('jobs:playground')}?model={model.model_id}",
    )
    for text in (page_text(alices.get(page)) for page in pages):
        assert f'value="{mode}" checked' in text
    detail = page_text(alices.get(pages[0]))
    assert words in detail
    assert ("Trained on" in detail) == bool(words)
    assert ("client.completions.create" in detail) == (kind in ("completion", "text"))


@pytest.mark.parametrize(
    ("field", "value", "label"),
    [
        ("temperature", "9", "Temperature"),
        ("top_p", "0", "Top-p"),
        ("max_tokens", "100000000", "Max tokens"),
        ("prompt", "", "Prompt"),
    ],
)
def test_the_playground_rejects_invalid_values(alices: Client, field: str, value: str, label: str) -> None:
    data = {
        "model": "starter",
        "prompt": "x",
        "temperature": "0",
        "top_p": "1",
        "max_tokens": "8",
        field: value,
    }
    response = alices.post(reverse("jobs:playground_stream"), data)
    assert response.status_code == 422
    assert f"{label}: " in response.json()["error"]


@pytest.mark.parametrize(
    ("tools", "mode", "words"),
    [
        ('[{"type": "function",\n  "function": {]', "chat", "line 2, column 16"),
        ("{}", "chat", ""),
        ("3", "chat", "tools is a number, not a list of objects"),
        ('[{"type": "function", "function": {}}]', "chat", "tool 1 has no name"),
        ("[" * 100_000, "chat", "nested too deeply"),
        ('[{"name": "look_up"}]', "prompt", "Choose Chat as the input type."),
    ],
)
def test_the_playground_names_what_is_wrong_with_tools(
    alices: Client, tools: str, mode: str, words: str
) -> None:
    form = GenerateForm({"model": "starter", "prompt": "x", "mode": mode, "tools": tools})
    assert form.is_valid() == (not words)
    assert words in " ".join(form.error_lines())
    if words and len(tools) < 1000:
        data = {"model": "starter", "prompt": "typed text", "mode": mode, "tools": tools}
        page = alices.post(reverse("jobs:playground"), data)
        assert words in page_text(page)
        for typed in ("typed text", tools):  # what was typed stays
            assert f">{escape(typed)}</textarea>" in page.content.decode()
        assert words in alices.post(reverse("jobs:playground_stream"), data).json()["error"]


def test_the_playground_shows_calls_and_explains_an_empty_answer() -> None:
    call = {"name": "look_up", "arguments": '{"what": "a cat"}'}
    assert shown_text("", [call]) == 'Calls look_up with {"what": "a cat"}'
    assert shown_text("On it.", [call, call]).splitlines() == ["On it.", *[shown_text("", [call])] * 2]
    answers = [{"model": "starter", "text": shown_text("", [])}]
    page = render_to_string("jobs/_playground.html", {"answers": answers, "typed": {}})
    assert "The model ended its answer at once." in page


def test_another_users_model_is_not_found(bobs: Client, alice: User) -> None:
    data = {"model": make_model(alice.owner_id).model_id, "prompt": "x"}
    response = bobs.post(reverse("jobs:playground_stream"), data)
    unknown = bobs.post(reverse("jobs:playground_stream"), data | {"model": "ft:starter:none:x:y"})
    assert response.status_code == unknown.status_code == 404
    assert response.json() == unknown.json()
