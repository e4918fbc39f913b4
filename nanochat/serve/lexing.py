"""The program that colours one piece of code: `{"language", "code"}` comes in, `[[kind, text], ...]` goes out.

`serve.highlight` starts it for each piece and ends it when it takes too long. It is run as a file, in isolated mode: it
imports Pygments and nothing of ours, so it is ready in a tenth of a second.
"""

import contextlib
import json
import sys
from typing import Any

MAX_CPU_S = 2
MAX_MEMORY_BYTES = 1 << 30

# Pygments' token types, the more special before the more general, and what the page calls them.
KINDS = (
    ("Comment.Preproc", "keyword"),
    ("Comment", "comment"),
    ("Keyword.Constant", "constant"),
    ("Keyword.Type", "type"),
    ("Keyword", "keyword"),
    ("Operator.Word", "keyword"),
    ("Operator", "operator"),
    ("Name.Class", "type"),
    ("Name.Exception", "type"),
    ("Name.Builtin", "type"),
    ("Name.Function", "function"),
    ("Name.Decorator", "function"),
    ("Name.Attribute", "function"),
    ("Name.Tag", "keyword"),
    ("Name.Constant", "constant"),
    ("Literal.Number", "number"),
    ("Literal", "string"),
    ("Generic.Inserted", "added"),
    ("Generic.Deleted", "removed"),
    ("Generic.Heading", "keyword"),
    ("Generic.Subheading", "keyword"),
    ("Generic.Prompt", "comment"),
)


def colour(language: str, code: str) -> list[tuple[str, str]]:
    """The pieces of `code` with their kinds; their texts together are the code. language: a name of Pygments'."""
    from pygments.lexers import get_lexer_by_name

    pieces: list[tuple[str, str]] = []
    for token_type, text in get_lexer_by_name(language, stripnl=False, ensurenl=False).get_tokens(code):
        kind = kind_of(token_type)
        if pieces and pieces[-1][0] == kind:
            pieces[-1] = (kind, pieces[-1][1] + text)
        elif text:
            pieces.append((kind, text))
    return pieces


def kind_of(token_type: Any) -> str:
    """What the page calls a token type of Pygments'."""
    name = ".".join(token_type)
    return next((kind for prefix, kind in KINDS if f"{name}.".startswith(f"{prefix}.")), "text")


def main() -> None:
    with contextlib.suppress(ImportError):  # Windows has no resource limits; the time limit of the caller holds there
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    asked = json.load(sys.stdin.buffer)
    sys.stdout.write(json.dumps(colour(asked["language"], asked["code"])))


if __name__ == "__main__":
    main()
