"""What the server says to /v1/completions: the continuation of texts, several prompts and several answers to each."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from nanochat.serve.logprobs import CompletionLogprobs
from nanochat.serve.replies import DONE, Event, Head, ends_of, error_object, sse, usage
from nanochat.serve.requests import Options
from nanochat.serve.writing import Delta, Finish
from nanochat.tokenizer import Tokenizer


class CompletionReply:
    """OpenAI's text_completion objects. n: answers to each prompt; the choices of a prompt stand side by side."""

    def __init__(self, model: str, tokenizer: Tokenizer, options: Options) -> None:
        self._head, self._n = Head("cmpl", model)("text_completion"), options.n
        self._tells_usage, self._tells_logprobs = options.include_usage, options.sampling.top_logprobs is not None
        self._finishes: list[Finish] = []
        self._logprobs: defaultdict[int, CompletionLogprobs] = defaultdict(lambda: CompletionLogprobs(tokenizer))

    def opening(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        if isinstance(event, Finish):
            self._finishes.append(event)
            return self._chunk(self._choice(event.choice, [], event.reason))
        return self._chunk(self._choice(event.choice, [event], None))

    def closing(self, failure: str = "") -> bytes:
        if failure:
            return sse(error_object(failure, kind="server_error")) + DONE
        total = {"choices": [], "usage": usage(self._finishes, self._n)}
        return (sse({**self._head, **total}) if self._tells_usage else b"") + DONE

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """All answers at once."""
        finishes = ends_of(events)
        written = {f.choice: [e for e in events if isinstance(e, Delta) and e.choice == f.choice] for f in finishes}
        choices = [self._choice(finish.choice, written[finish.choice], finish.reason) for finish in finishes]
        return {**self._head, "choices": choices, "usage": usage(finishes, self._n)}

    def _choice(self, index: int, deltas: Sequence[Delta], reason: str | None) -> dict[str, Any]:
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = self._logprobs[index](tokens) if self._tells_logprobs else None
        text = "".join(delta.text for delta in deltas)
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        total = {"usage": None} if self._tells_usage else {}
        return sse({**self._head, "choices": [choice], **total})
