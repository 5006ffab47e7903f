"""The FastAPI application: routes, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moeforge import __version__
from moeforge.serve import page
from moeforge.serve.async_engine import AsyncEngine
from moeforge.serve.openai.errors import ApiError, bad_request, shown
from moeforge.serve.openai.generation import Generation
from moeforge.serve.openai.guard import Guard, cache_salt
from moeforge.serve.openai.logprobs import TokenTexts
from moeforge.serve.openai.metrics import CONTENT_TYPE, Metrics
from moeforge.serve.openai.prompts import Prompt, Prompts
from moeforge.serve.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, parse
from moeforge.serve.openai.replies import ClientGone, EventStream, encoded, json_response, to_json, unless_gone
from moeforge.serve.openai.sampling import check_size, max_tokens, sampling_params
from moeforge.serve.openai.settings import ServerSettings
from moeforge.serve.openai.writers import ChatWriter, CompletionWriter, Writer

# Of OpenAI's and vLLM's API, and not here: a clear word instead of "not found".
UNSUPPORTED_ROUTES = (
    "assistants", "audio", "batches", "classify", "containers", "embeddings", "evals", "files", "fine_tuning", "images",
    "load_lora_adapter", "moderations", "pooling", "realtime", "rerank", "responses", "score", "threads",
    "unload_lora_adapter", "uploads", "vector_stores", "videos",
)  # fmt: skip
_ON_LOOP = 2000  # tokens and log-probabilities that are written in place: a few milliseconds
Model = TypeVar("Model", bound=BaseModel)


class Service:
    """What the routes share. `generations`: what runs now; `closing`: why nothing new is taken, if so."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        core = engine.engine
        self.prompts = Prompts(core.tokenizer, core.max_model_len)
        self.texts = TokenTexts(core.tokenizer)
        self.metrics = Metrics(engine, settings.model)
        self.generations: set[Generation] = set()
        self.closing: str | None = None
        self.started = time.time()

    @property
    def trouble(self) -> str | None:
        """Why the server is not healthy; None if it is."""
        return self.engine.failed or self.closing

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a model that is not served."""
        if name is not None and name != self.settings.model:
            message = f"model {shown(name)!r}: is not served here; this server has {self.settings.model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def begin(self, request: Request, wanted: GenerationRequest, kind: str, prompts: list[Prompt]) -> Generation:
        """Hand the prompts to the engine. Raises ApiError as `Generation.start` does."""
        if self.trouble is not None:
            raise ApiError(503, self.trouble, code="unavailable")
        params = sampling_params(wanted, len(prompts), self.settings)
        check_size(params, [self.prompts.max_model_len - len(prompt.ids) for prompt in prompts])
        salt = cache_salt(request.state.tenant, wanted.cache_salt)
        name = f"{kind}-{uuid.uuid4().hex}"
        generation = await Generation.start(self.engine, self.metrics, name, prompts, params, salt)
        self.generations.add(generation)
        return generation

    async def answer(self, request: Request, wanted: GenerationRequest, writer: Writer) -> Response:
        """The generation as a stream or in one piece; it ends with the client's interest."""

        def end() -> None:
            writer.generation.abort()
            self.generations.discard(writer.generation)

        if wanted.stream:
            return EventStream(writer.events(), end)
        try:
            return await unless_gone(request, self._whole(writer))
        finally:
            end()

    async def _whole(self, writer: Writer) -> Response:
        make = await writer.whole()
        if writer.values <= _ON_LOOP:
            return json_response(make())
        return encoded(await asyncio.to_thread(lambda: to_json(make())))

    def stats(self) -> dict[str, Any]:
        """Live numbers for the page; counters since the start."""
        stats = self.engine.stats
        return {
            "model": self.settings.model,
            "max_model_len": self.prompts.max_model_len,
            "uptime_seconds": round(time.time() - self.started, 1),
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage": stats.kv_cache_usage,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
            "preemptions": stats.preemptions,
            "prefix_cache_queries": stats.prefix_queries,
            "prefix_cache_hits": stats.prefix_hits,
            "requests_by_finish_reason": dict(stats.requests_by_finish_reason),
            "trouble": self.trouble,
        }


async def _body(request: Request, model: type[Model]) -> Model:
    """The body as `model`. Its bytes are dropped: `request.body()` would keep them for as long as the answer takes."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
    parsed = parse(model, bytes(raw))
    request.state.release_body()
    return parsed


def build_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The application for an engine that someone else starts and shuts down; `app.state.service` is its Service."""
    app = FastAPI(title="moeforge", version=__version__, openapi_url=None, redirect_slashes=False)
    service = app.state.service = Service(engine, settings)
    app.add_middleware(Guard, settings=settings)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = await _body(request, CompletionRequest)
        service.check_model(wanted.model)
        given = wanted.prompts(settings.max_choices)
        sampling_params(wanted, len(given), settings)  # refuses early, before anything is tokenised
        special = wanted.add_special_tokens is not False

        async def begin() -> Generation:
            prompts = [await service.prompts.completion(one, special, wanted.max_tokens) for one in given]
            return await service.begin(request, wanted, "cmpl", prompts)

        generation = await unless_gone(request, begin())
        return await service.answer(
            request, wanted, CompletionWriter(wanted, generation, settings.model, service.texts)
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        wanted = await _body(request, ChatCompletionRequest)
        service.check_model(wanted.model)
        sampling_params(wanted, 1, settings)
        options = dict(wanted.chat_template_kwargs or {})
        conversation = wanted.conversation()

        async def begin() -> Generation:
            prompt = await service.prompts.chat(conversation, options, max_tokens(wanted))
            return await service.begin(request, wanted, "chatcmpl", [prompt])

        generation = await unless_gone(request, begin())
        return await service.answer(request, wanted, ChatWriter(wanted, generation, settings.model, service.texts))

    model_card = {
        "id": settings.model, "object": "model", "created": int(service.started), "owned_by": "moeforge",
        "max_model_len": service.prompts.max_model_len,
    }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(model_card)

    @app.get("/health")
    async def health() -> Response:
        if service.trouble is not None:
            raise ApiError(503, service.trouble, code="unavailable")
        return json_response({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/stats")
    async def stats() -> Response:
        return json_response(service.stats())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    for path, asset in page.assets().items():
        _serve_asset(app, path, *asset)
    _handle_errors(app)
    return app


def _serve_asset(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path)
    async def asset() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404 and path.removeprefix("/v1/").partition("/")[0] in UNSUPPORTED_ROUTES:
            return bad_request(f"{shown(path)}: not supported by this server", code="not_supported").response()
        what = f"{request.method} {shown(path)}"
        message = f"{what}: no such route" if error.status_code == 404 else f"{what}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed to answer; its log says why").response()
