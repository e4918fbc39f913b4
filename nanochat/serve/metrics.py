"""The server's figures for Prometheus, in its text format: a name, what it means, and a number for each model."""

from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "workers": "engines that take requests",
    "rows": "answers that can be written at once",
    "busy": "answers being written",
    "waiting": "answers in the waiting line",
    "max_waiting": "places in the waiting line",
}
ENDS = ("stop", "length", "cancelled", "error", "refused")


def prometheus_text(models: Mapping[str, Mapping[str, int]]) -> str:
    """`Workers.stats` of every model by its name."""
    lines = []
    for name, meaning in GAUGES.items():
        lines += [f"# HELP nanochat_{name} {meaning}", f"# TYPE nanochat_{name} gauge"]
        lines += [f'nanochat_{name}{{model="{_escaped(model)}"}} {stats[name]}' for model, stats in models.items()]
    lines += ["# HELP nanochat_answers_total answers by how they ended", "# TYPE nanochat_answers_total counter"]
    for model, stats in models.items():
        lines += [f'nanochat_answers_total{{model="{_escaped(model)}",end="{end}"}} {stats[end]}' for end in ENDS]
    lines += ["# HELP nanochat_tokens_total tokens written", "# TYPE nanochat_tokens_total counter"]
    lines += [
        f'nanochat_tokens_total{{model="{_escaped(model)}"}} {stats["tokens"]}' for model, stats in models.items()
    ]
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
