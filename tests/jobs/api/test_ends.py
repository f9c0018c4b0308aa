"""Answers through the API and the playground end by themselves, in each of the six ways of ending."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from django.conf import settings

from tests.jobs.api.conftest import ApiUser, make_session, put_model
from tests.training.ending_models import CASES, PROMPTS, answer_to, tune

pytestmark = pytest.mark.campaign


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, web_with_inference: Any, users: dict[str, ApiUser]) -> str:
    _, _, folder = tune(request.param)
    return put_model(users["alice"], request.param.replace(" ", "-"), folder)


def in_playground(browser: httpx.Client, url: str, model: str, prompt: str) -> tuple[str, str]:
    """The text and the finish reason that the page gets."""
    form = {"model": model, "prompt": prompt, "mode": "chat", "max_tokens": "40"}
    form["csrfmiddlewaretoken"] = browser.cookies[settings.CSRF_COOKIE_NAME]
    response = browser.post(f"{url}/playground/stream", data=form, headers={"Referer": url})
    lines = [json.loads(line) for line in response.text.splitlines()]
    text = "".join(line["text"] for line in lines if line["t"] == "token")
    return text.strip(), lines[-1]["choices"][0]["finish_reason"]


def test_answers_end_by_themselves(
    client: openai.OpenAI, web: Any, users: dict[str, ApiUser], model: str
) -> None:
    with httpx.Client(timeout=60) as browser:
        session = make_session(users["alice"].user)
        browser.cookies.set(settings.SESSION_COOKIE_NAME, session.session_key)
        browser.get(f"{web.url}/playground/")
        complete = streamed = 0
        for prompt in PROMPTS:
            [choice] = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=40,
                temperature=0,
            ).choices
            text = (choice.message.content or "").strip()
            complete += (text, choice.finish_reason) == (answer_to(prompt), "stop")
            streamed += in_playground(browser, web.url, model, prompt) == (answer_to(prompt), "stop")
    assert complete >= 19
    assert streamed >= 19
