"""What can be asked of the server, and what is answered."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.serve.access import Access
from nanochat.serve.answers import Answers, read_body
from nanochat.serve.completions import CompletionReply
from nanochat.serve.conversations import ConversationLog
from nanochat.serve.highlight import Highlighter
from nanochat.serve.limits import LIMITS, Defaults, RequestError
from nanochat.serve.metrics import CONTENT_TYPE, prometheus_text
from nanochat.serve.prompts import ContextPolicy, chat_tasks, check_ids, completion_tasks
from nanochat.serve.replies import UNFINISHED, AncestorReply, ChatReply, Stream, ends_of, error_object
from nanochat.serve.requests import (
    ChatRequest,
    CompletionRequest,
    parse_chat_request,
    parse_completion_request,
    parse_detokenize_request,
    parse_tokenize_request,
)
from nanochat.serve.workers import Task, Workers
from nanochat.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

UI = Path(__file__).parent / "ui"


@dataclass(frozen=True)
class House:
    """What the server was told when it was started. models: the first one answers who names none."""

    models: Sequence[Workers]
    defaults: Defaults = field(default_factory=Defaults)
    access: Access = field(default_factory=Access)
    context: ContextPolicy = "truncate"
    log: ConversationLog | None = None

    def model(self, name: str | None) -> Workers:
        """The model that a request means."""
        names = [model.name for model in self.models]
        if name is not None and name not in names:
            message = f"model {name[:40]!r} is not served here; leave it out or use one of {', '.join(names)}"
            raise RequestError(message, "model", status=404, code="model_not_found")
        return self.models[0 if name is None else names.index(name)]


def routes_of(house: House) -> "list[BaseRoute]":
    """What can be asked."""
    return [*plain_routes(house), *tokenizer_routes(house), *answer_routes(house)]


def plain_routes(house: House) -> "list[BaseRoute]":
    """The page, and what is known of the server."""
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    highlighter = Highlighter()

    async def page(request: "Request") -> Response:
        return FileResponse(UI / "index.html")

    async def health(request: "Request") -> Response:
        is_ready = all(workers.num_ready for workers in house.models)
        status = "ok" if is_ready else "no worker is running"
        content = {"status": status, "ready": is_ready, "model": house.models[0].name}
        return JSONResponse(content, 200 if is_ready else 503)

    async def stats(request: "Request") -> Response:
        each = {workers.name: workers.stats() for workers in house.models}
        total = {name: sum(stats[name] for stats in each.values()) for name in house.models[0].stats()}
        return JSONResponse({**total, "models": each})

    async def metrics(request: "Request") -> Response:
        text = prometheus_text({workers.name: workers.stats() for workers in house.models})
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def highlight(request: "Request") -> Response:
        return JSONResponse(await highlighter.answer(await read_body(request)))

    async def models(request: "Request") -> Response:
        cards = [describe_model(workers, house.defaults) for workers in house.models]
        return JSONResponse({"object": "list", "data": cards})

    async def model(request: "Request") -> Response:
        return JSONResponse(describe_model(house.model(request.path_params["name"]), house.defaults))

    return [
        Route("/", page),
        Route("/health", health),
        Route("/stats", stats),
        Route("/metrics", metrics),
        Route("/highlight", highlight, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Mount("/ui", StaticFiles(directory=UI)),
    ]


def tokenizer_routes(house: House) -> "list[BaseRoute]":
    """The tokenizer, for clients that must count or send tokens and have none of their own, as lm-eval.

    A text that is exactly the name of a special token is that token here, so that its id can be asked for.
    """
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def about(request: "Request") -> JSONResponse:
        return JSONResponse({"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"})

    async def tokenize(request: "Request") -> JSONResponse:
        name, text = parse_tokenize_request(await read_body(request))
        model = house.model(name)
        if text in SPECIAL_TOKENS:
            ids = [model.tokenizer.special(text)]
        else:
            ids = await asyncio.to_thread(model.tokenizer.encode, text)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context_tokens})

    async def detokenize(request: "Request") -> JSONResponse:
        name, ids = parse_detokenize_request(await read_body(request))
        tokenizer = house.model(name).tokenizer
        check_ids(ids, tokenizer, "tokens")
        return JSONResponse({"prompt": tokenizer.decode(ids)})

    return [
        Route("/tokenizer_info", about),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def answer_routes(house: House) -> "list[BaseRoute]":
    """What a model writes an answer to."""
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    seeds = random.Random(house.defaults.seed)

    async def begin(request: "Request", asked: ChatRequest | CompletionRequest) -> tuple[Workers, Answers]:
        workers = house.model(asked.options.model)
        workers.check_room()  # before work is spent on the prompt
        tasks = await asyncio.to_thread(make_tasks, asked, workers, house.context)
        log = None if house.log is None else partial(house.log.add, workers.name, asked.asked)
        return workers, Answers(workers, tasks, request, log)

    def streamed(answers: Answers, reply: Stream) -> Response:
        return StreamingResponse(answers.stream(reply), media_type="text/event-stream")

    async def respond(
        request: "Request", asked: ChatRequest | CompletionRequest, kind: type[ChatReply | CompletionReply]
    ) -> Response:
        workers, answers = await begin(request, asked)
        reply = kind(workers.name, workers.tokenizer, asked.options)
        if asked.options.stream:
            return streamed(answers, reply)
        events = await answers.collect()
        for finish in ends_of(events):
            if finish.reason in UNFINISHED:
                status = 500 if finish.reason == "error" else 503
                return JSONResponse(error_object(UNFINISHED[finish.reason], kind="server_error"), status)
        return JSONResponse(reply.whole(events))

    async def read_chat(request: "Request") -> ChatRequest:
        return parse_chat_request(await read_body(request), house.defaults, seeds.getrandbits(31))

    async def chat(request: "Request") -> Response:
        return await respond(request, await read_chat(request), ChatReply)

    async def ancestor_chat(request: "Request") -> Response:
        _, answers = await begin(request, await read_chat(request))
        return streamed(answers, AncestorReply())

    async def complete(request: "Request") -> Response:
        asked = parse_completion_request(await read_body(request), house.defaults, seeds.getrandbits(31))
        return await respond(request, asked, CompletionReply)

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/chat/completions", ancestor_chat, methods=["POST"]),
    ]


def make_tasks(asked: ChatRequest | CompletionRequest, workers: Workers, policy: ContextPolicy) -> list[Task]:
    """The answers that a request asks a model for."""
    if isinstance(asked, ChatRequest):
        tasks = chat_tasks(asked, workers.tokenizer, workers.context_tokens, policy)
    else:
        tasks = completion_tasks(asked, workers.tokenizer, workers.context_tokens)
    if len(tasks) > workers.capacity:
        told = f"n: {len(tasks)} answers; this server has rows and places in its line for {workers.capacity}"
        raise RequestError(told, "n")
    return tasks


def describe_model(workers: Workers, defaults: Defaults) -> dict[str, Any]:
    """OpenAI's model object, and beside it what a client of this server may want to know."""
    known = {name: limit.value for name, limit in LIMITS.items()} | {"max_waiting": workers.max_waiting}
    about = {"context_tokens": workers.context_tokens, "defaults": defaults.sampling(), "limits": known}
    return {"id": workers.name, "object": "model", "created": 0, "owned_by": "nanochat", "nanochat": about}
