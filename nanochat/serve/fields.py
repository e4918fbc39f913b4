"""Reading a client's JSON: every value is checked, and what is wrong is told in one sentence that names the field."""

import json
from collections.abc import Sequence
from typing import Any, cast

from nanochat.serve.limits import LIMITS, MAX_JSON_DEPTH, RequestError, refusal, spelled


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is."""
    try:
        fields = json.loads(body)
    except RecursionError as error:
        raise refusal("max_json_depth") from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of absurd length
        raise RequestError("the body is not valid JSON in UTF-8") from error
    if not isinstance(fields, dict):
        raise RequestError('the body must be a JSON object such as {"messages": [...]}')
    if _is_deeper(fields, MAX_JSON_DEPTH):
        raise refusal("max_json_depth")
    return fields


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for values in inner for v in values]
    return any(isinstance(v, (dict, list)) for v in level)


def number(fields: dict[str, Any], name: str, low: float, limit: str, default: float) -> float:
    """A number from `low` to what the table of limits says of `limit`."""
    return _checked(fields, name, low, limit, default, (int, float), "a number")


def whole_number(fields: dict[str, Any], name: str, low: int, limit: str, default: int) -> int:
    """The same of a whole number."""
    return int(_checked(fields, name, low, limit, default, (int,), "a whole number"))


def _checked(
    fields: dict[str, Any], name: str, low: float, limit: str, default: float, kinds: tuple[type, ...], kind: str
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not low <= (found := cast(float, value)) <= LIMITS[limit].value:
        raise refusal(limit, name, name=name, given=shown(value), kind=kind, low=spelled(low))
    return found


def switch(fields: dict[str, Any], name: str) -> bool:
    """true or false; false where it is not given."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}: must be true or false", name)
    return bool(value)


def strings(fields: dict[str, Any], name: str) -> list[str]:
    """A string or a list of them; none where it is not given."""
    value = fields.get(name)
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RequestError(f"{name}: must be a string or a list of strings", name)
    for text in found:
        check_characters(text, name)
    return found


def check_characters(text: str, where: str) -> None:
    """Raise RequestError for half of a character, which could not be sent back."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError("a text holds half of a character (an unpaired surrogate)", where)


def check_names(fields: dict[str, Any], known: frozenset[str], without_effect: dict[str, Sequence[object]]) -> None:
    """Refuse unknown names, and settings that we do not have unless their value asks for nothing."""
    for name, value in fields.items():
        if name in without_effect:
            if value is not None and not any(value == harmless for harmless in without_effect[name]):
                raise RequestError(f"{name}: this server does not support it; leave it out", name, code="unsupported")
        elif name not in known:
            param = shorten(name.encode(errors="replace").decode(), 40)  # half a character could not be sent back
            raise RequestError(f"{shown(name)}: unknown field; known are {', '.join(sorted(known))}", param)


def shown(value: object) -> str:
    """A client's value as it may stand in a sentence."""
    return shorten(json.dumps(value), 40)


def shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
