"""Which models of the Hub may be a base, checked over HTTP against `tests.hub_server`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.registry import hub_models
from jobs.store.errors import Refused
from tests.hub_server import COMMIT, CONFIG, HubServer, running, write_repository

TOKEN = "hf_" + "operators" * 4


@pytest.fixture
def hub(tmp_path: Path, settings: Any) -> Iterator[HubServer]:
    hub_models._refused.clear()
    with running({}) as server:
        server.token = TOKEN
        settings.HF_ENDPOINT, settings.HF_TOKEN = server.url, TOKEN
        settings.HUB_MODELS, settings.HUB_MAX_GB = ["public"], 20.0
        yield server


def put(
    hub: HubServer, folder: Path, name: str = "people/tiny", config: Any = CONFIG, **overrides: Any
) -> Path:
    """Adds a repository. `overrides` are fields of its description."""
    folder = write_repository(folder / name, config)
    hub.repositories[name], hub.overrides[name] = folder, overrides
    return folder


def refusal(name: str = "people/tiny") -> str:
    with pytest.raises(Refused) as refused:
        hub_models.fetch_description(name)
    return str(refused.value)


def test_a_public_model_is_accepted_with_its_hub_description(hub, tmp_path):
    folder = put(hub, tmp_path, cardData={"license": "apache-2.0", "language": ["en", "de"]}, safetensors={"total": 1234})  # fmt: skip
    result = hub_models.fetch_description("people/tiny")
    model = result.model
    assert (result.revision, model.id, model.parameters, model.layers) == (COMMIT, "people/tiny", 1234, 2)
    assert (model.licence, model.languages, model.context) == ("apache-2.0", "English, German", 128)
    sizes = [(folder / name).stat().st_size for name in ("config.json", "tokenizer.json", "model.safetensors")]  # fmt: skip
    assert model.download == sum(sizes)  # the pickle is never downloaded
    assert not {token for _, token in hub.requests} - {""}, "the operator's token was sent"


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (CONFIG | {"auto_map": {"AutoModel": "evil.Model"}}, {}, "custom code"),
        (CONFIG | {"architectures": ["BertForMaskedLM"]}, {}, "not a causal language model: it is BertForMaskedLM"),
        (CONFIG | {"architectures": ["LlavaForConditionalGeneration"]}, {}, "not a causal language model"),
        ({"model_type": "llama"}, {}, "names no architecture"),
        (CONFIG | {"quantization_config": {"quant_method": "gptq"}}, {}, "quantized (gptq)"),
        (CONFIG | {"hidden_size": None}, {}, "cannot be used"),
        ([1], {}, "is not valid"),
        (CONFIG, {"gated": "auto"}, "accepted its license"),
        (CONFIG, {"disabled": True}, "disabled"),
        (CONFIG, {"sha": "main"}, "no revision"),
        (CONFIG, {"id": "../../etc"}, "a name that cannot be used"),
        (CONFIG, {"siblings": [{"rfilename": "model.safetensors"}]}, "no config.json"),
        (CONFIG, {"siblings": "none"}, "no safetensors"),
    ],
)  # fmt: skip
def test_an_unsuitable_model_is_refused_with_a_reason(hub, tmp_path, config, overrides, message):
    put(hub, tmp_path, config=config, **overrides)
    assert message in refusal()


def test_a_model_without_safe_weights_is_refused(hub, tmp_path):
    (put(hub, tmp_path) / "model.safetensors").unlink()
    assert "no safetensors weights" in refusal()


def test_a_model_without_a_tokenizer_is_refused(hub, tmp_path):
    (put(hub, tmp_path) / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refusal()


def test_a_model_larger_than_allowed_is_refused_before_its_config_is_read(hub, tmp_path, settings):
    put(hub, tmp_path)
    settings.HUB_MAX_GB = 0.000001
    assert "The limit is 1e-06 GB" in refusal()
    assert not hub.fetched


def test_a_private_model_looks_like_an_unknown_one(hub, tmp_path):
    put(hub, tmp_path, private=True)
    private, unknown = refusal(), refusal("people/unknown")
    assert private == unknown.replace("unknown", "tiny")
    assert not {token for _, token in hub.requests} - {""}


def test_the_token_is_sent_for_models_the_operator_named(hub, tmp_path, settings):
    put(hub, tmp_path, private=True, gated="manual")
    settings.HUB_MODELS = ["public", "people/*"]
    assert hub_models.fetch_description("people/tiny").revision == COMMIT
    assert {token for _, token in hub.requests} == {TOKEN}


def test_the_token_is_not_sent_to_another_host(hub, tmp_path, settings):
    put(hub, tmp_path)
    with running(hub.repositories) as other:
        hub.redirect_to = other.url.replace("127.0.0.1", "localhost")
        settings.HUB_MODELS = ["people/*"]
        assert hub_models.fetch_description("people/tiny").revision == COMMIT
        assert other.requests
        assert {token for _, token in other.requests} == {""}


def test_only_models_the_operator_allows_are_looked_up(hub, tmp_path, settings):
    put(hub, tmp_path)
    settings.HUB_MODELS = ["others/*"]
    assert "only others/*" in refusal()
    settings.HUB_MODELS = []
    assert "those in the list" in refusal()
    assert not hub.requests


@pytest.mark.parametrize("name", ["gpt", "a/b/c", "../etc/passwd", "a/..b", "a/b?x=1", "a/b#c", "", "/a", "ä/b", "a/b\n"])  # fmt: skip
def test_a_malformed_id_is_never_looked_up(hub, name):
    assert "not a model ID" in refusal(name)
    assert not hub.requests


def test_an_unreachable_hub_is_tried_again(hub, tmp_path, settings):
    put(hub, tmp_path)
    reachable, settings.HF_ENDPOINT = settings.HF_ENDPOINT, "http://127.0.0.1:9"
    assert "could not be reached" in refusal()
    settings.HF_ENDPOINT = reachable
    assert hub_models.fetch_description("people/tiny")


def test_a_slow_hub_times_out(hub, tmp_path, monkeypatch):
    put(hub, tmp_path)
    monkeypatch.setattr(hub_models, "DEADLINE_S", 0.5)
    hub.byte_delay_s = 0.2  # the whole response would take a minute and be accepted
    assert "could not be reached" in refusal()


def test_a_refusal_is_cached(hub):
    refusal()
    before = len(hub.requests)
    refusal()
    assert len(hub.requests) == before
