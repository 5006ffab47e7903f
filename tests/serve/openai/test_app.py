"""The small routes: models, health, version, stats, metrics, the page; what is not there."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeforge import __version__


def test_models(shared: Any) -> None:
    client = shared.openai()
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "moeforge")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other")


def test_health_version_and_page(shared: Any) -> None:
    with shared.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").json() == {"version": __version__}
        page = http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for path in ("/page.css", "/page.js"):
            assert path in page.text and http.get(path).status_code == 200
        # nothing is inline, nothing comes from elsewhere
        assert "<style" not in page.text and " style=" not in page.text and "http" not in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        assert page.headers["x-content-type-options"] == "nosniff" and "server" not in page.headers


def test_metrics_bear_vllms_names(serve: Any) -> None:
    served = serve()
    list(served.openai().completions.create(model="tiny", prompt="abc", max_tokens=5, n=2, stream=True))
    with served.http() as http:
        reply = http.get("/metrics")
        stats = http.get("/stats").json()
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if "le" not in sample.labels and sample.labels["model_name"] == "tiny"
    }
    expected = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.25, "prompt_tokens_total": 3,
        "generation_tokens_total": 10, "num_preemptions_total": 3, "prefix_cache_queries_total": 20,
        "prefix_cache_hits_total": 10, "time_to_first_token_seconds_count": 2, "inter_token_latency_seconds_count": 8,
        "e2e_request_latency_seconds_count": 2,
    }  # fmt: skip
    assert {name: samples[f"vllm:{name}", None] for name in expected} == expected
    assert samples["vllm:request_success_total", "length"] == 1
    assert (stats["generation_tokens"], stats["kv_cache_usage"], stats["trouble"]) == (10, 0.25, None)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/audio/speech", "/v1/load_lora_adapter"])
def test_routes_of_openai_that_are_not_here(shared: Any, path: str) -> None:
    with shared.http() as http:
        reply = http.post(path, json={"model": "tiny", "input": "x"})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "not_supported"
    assert path in reply.json()["error"]["message"]


def test_unknown_routes_and_methods(shared: Any) -> None:
    with shared.http() as http:
        for method, path, status in (
            ("GET", "/v2", 404), ("POST", "/v1/chat", 404), ("GET", "/v1/completions", 405), ("GET", "/page.py", 404),
            ("DELETE", "/v1/models", 405), ("GET", "/../../etc/passwd", 404), ("GET", "/docs", 404), ("PUT", "/", 405),
        ):  # fmt: skip
            reply = http.request(method, path, **({"json": {}} if method == "POST" else {}))
            assert reply.status_code == status, path
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_fault_of_the_server_is_a_plain_500(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    monkeypatch.setattr(served.engine, "submit", lambda *a: 1 / 0)
    with served.http() as http:
        reply = http.post("/v1/completions", json={"prompt": "a"})
    assert reply.status_code == 500 and "ZeroDivision" not in reply.text and reply.json()["error"]["message"]
