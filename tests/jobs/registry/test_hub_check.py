"""Which models of the Hub may be a base, asked over HTTP from `tests.hub_server`."""

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


def put(hub: HubServer, folder: Path, name: str = "people/tiny", config: Any = CONFIG, **told: Any) -> Path:
    """A repository; `told` is what its description says besides."""
    folder = write_repository(folder / name, config)
    hub.repositories[name], hub.told[name] = folder, told
    return folder


def refusal(name: str = "people/tiny") -> str:
    with pytest.raises(Refused) as refused:
        hub_models.fetch_description(name)
    return str(refused.value)


def test_a_public_model_is_taken_with_what_the_hub_says_of_it(hub, tmp_path):
    folder = put(hub, tmp_path, cardData={"license": "apache-2.0", "language": ["en", "de"]}, safetensors={"total": 1234})  # fmt: skip
    found = hub_models.fetch_description("people/tiny")
    model = found.model
    assert (found.revision, model.id, model.parameters, model.layers) == (COMMIT, "people/tiny", 1234, 2)
    assert (model.licence, model.languages, model.context) == ("apache-2.0", "English, German", 128)
    sizes = [(folder / name).stat().st_size for name in ("config.json", "tokenizer.json", "model.safetensors")]  # fmt: skip
    assert model.download == sum(sizes)  # the pickle is never fetched
    assert not {token for _, token in hub.asked} - {""}, "the operator's token went along"


@pytest.mark.parametrize(
    ("config", "told", "message"),
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
def test_what_may_not_be_a_base_is_refused_with_its_reason(hub, tmp_path, config, told, message):
    put(hub, tmp_path, config=config, **told)
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


def test_a_private_model_is_as_unknown_as_none(hub, tmp_path):
    put(hub, tmp_path, private=True)
    mine, nobodys = refusal(), refusal("people/nobodys")
    assert mine == nobodys.replace("nobodys", "tiny")
    assert not {token for _, token in hub.asked} - {""}


def test_the_token_is_lent_for_models_the_operator_named(hub, tmp_path, settings):
    put(hub, tmp_path, private=True, gated="manual")
    settings.HUB_MODELS = ["public", "people/*"]
    assert hub_models.fetch_description("people/tiny").revision == COMMIT
    assert {token for _, token in hub.asked} == {TOKEN}


def test_the_token_does_not_follow_to_another_host(hub, tmp_path, settings):
    put(hub, tmp_path)
    with running(hub.repositories) as other:
        hub.moved = other.url.replace("127.0.0.1", "localhost")
        settings.HUB_MODELS = ["people/*"]
        assert hub_models.fetch_description("people/tiny").revision == COMMIT
        assert other.asked
        assert {token for _, token in other.asked} == {""}


def test_only_what_the_operator_allows_is_asked_about(hub, tmp_path, settings):
    put(hub, tmp_path)
    settings.HUB_MODELS = ["others/*"]
    assert "only others/*" in refusal()
    settings.HUB_MODELS = []
    assert "those in the list" in refusal()
    assert not hub.asked


@pytest.mark.parametrize("name", ["gpt", "a/b/c", "../etc/passwd", "a/..b", "a/b?x=1", "a/b#c", "", "/a", "ä/b", "a/b\n"])  # fmt: skip
def test_what_is_no_id_is_never_asked_about(hub, name):
    assert "not a model ID" in refusal(name)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached_may_be_asked_again(hub, tmp_path, settings):
    put(hub, tmp_path)
    here, settings.HF_ENDPOINT = settings.HF_ENDPOINT, "http://127.0.0.1:9"
    assert "could not be reached" in refusal()
    settings.HF_ENDPOINT = here
    assert hub_models.fetch_description("people/tiny")


def test_a_hub_that_drips_is_left_in_time(hub, tmp_path, monkeypatch):
    put(hub, tmp_path)
    monkeypatch.setattr(hub_models, "DEADLINE_S", 0.5)
    hub.drip_s = 0.2  # the whole of it would take a minute, and be no refusal
    assert "could not be reached" in refusal()


def test_a_refusal_is_remembered_for_a_while(hub):
    refusal()
    asked = len(hub.asked)
    refusal()
    assert len(hub.asked) == asked
