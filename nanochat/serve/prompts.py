"""From a checked request to the answers to be written: token ids, room in the context, reader, tools.

A conversation that does not fit the model's context is shortened (`truncate`: the oldest turns are forgotten first, see
`nanochat.chat`) or refused (`refuse`), as the server was told; both by the same number, `prompt_room`. The prompt of
/v1/completions is always refused, for nobody could say which part of a text is the least important. What an answer may
have beyond the room that is left is cut: it ends with `length`.

A completion's prompt that does not begin with the token that begins every document of the training gets it; it is
neither echoed nor given a probability.
"""

import sys
from typing import Literal

from nanochat.chat import ReplyReader, prompt_room, render_for_completion
from nanochat.serve.limits import TOO_LONG, RequestError
from nanochat.serve.requests import ChatRequest, CompletionRequest, Options
from nanochat.serve.workers import Task
from nanochat.serve.writing import PlainReader, Reader, Writer
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook

ContextPolicy = Literal["truncate", "refuse"]
POLICIES: tuple[ContextPolicy, ...] = ("truncate", "refuse")


def chat_tasks(request: ChatRequest, tokenizer: Tokenizer, context: int, policy: ContextPolicy) -> list[Task]:
    """The `n` answers to a conversation. Raises RequestError where it is too long and must not be shortened."""
    room = prompt_room(context, request.options.max_tokens)
    prompt = render_for_completion(tokenizer, {"messages": request.messages}, sys.maxsize)
    if len(prompt) > room:
        if policy == "refuse":
            raise _too_long("the conversation", len(prompt), room, "messages")
        prompt = render_for_completion(tokenizer, {"messages": request.messages}, room)
    tasks = []
    for choice in range(request.options.n):
        hook, reader = CalculatorHook(tokenizer), ReplyReader(tokenizer)
        tasks.append(_task(request.options, choice, prompt, context, reader, hook=hook))
    return tasks


def completion_tasks(request: CompletionRequest, tokenizer: Tokenizer, context: int) -> list[Task]:
    """`n` continuations of each prompt, side by side. Raises RequestError for a prompt that is too long or unknown."""
    options, tasks = request.options, list[Task]()
    for prompt in request.prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        check_ids(ids, tokenizer, "prompt")
        start = 0 if ids and ids[0] == tokenizer.bos else 1
        ids = [tokenizer.bos] * start + ids
        room = context - min(1, options.max_tokens)
        if len(ids) > room:
            raise _too_long("the prompt", len(ids), room, "prompt")
        for _ in range(options.n):
            echo_from, reader = start if request.echo else None, PlainReader(tokenizer)
            tasks.append(_task(options, len(tasks), ids, context, reader, echo_from=echo_from))
    return tasks


def check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> None:
    """Raise RequestError for an id that the tokenizer does not have."""
    if (largest := max(ids, default=0)) >= tokenizer.vocab_size:
        given = f"{largest}" if largest < 10**12 else "huge"
        told = f"{param}: there is no token {given}; this model has the ids 0 to {tokenizer.vocab_size - 1}"
        raise RequestError(told, param)


def _too_long(what: str, given: int, room: int, param: str) -> RequestError:
    told = f"{what} has {given:,} tokens; beside an answer this model's context has room for {room:,}"
    return RequestError(told, param, code=TOO_LONG)


def _task(
    options: Options,
    choice: int,
    prompt: list[int],
    context: int,
    reader: Reader,
    hook: CalculatorHook | None = None,
    echo_from: int | None = None,
) -> Task:
    """One answer. Those to the same prompt draw different numbers, being different samples."""
    writer = Writer(choice, reader, options.stop, keeps_tokens=options.sampling.top_logprobs is not None)
    limit = min(options.max_tokens, context - len(prompt))
    return Task(choice, choice % options.n, prompt, limit, options.sampling, writer, hook, echo_from)
