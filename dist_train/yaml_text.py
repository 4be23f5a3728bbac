"""YAML as a person reads it: the core schema of YAML 1.2, and nothing that could surprise or harm.

`on`, `no` and `24:00:00` are strings, `0123` is 123, `3e-4` is a number. Tags, repeated keys, merge keys, several
documents, deep nesting and alias bombs are errors. The only file that knows ruamel.yaml.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from dist_train.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOLEAN = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_BASED = re.compile(r"0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}


def read_yaml(text: str | bytes, source: str) -> Any:
    """The one document in `text`. Raises UserError as `source:line: what is wrong`."""
    if len(text) > MAX_BYTES:
        raise UserError(
            f"{source}: {len(text):,} bytes, expected a YAML text of at most {MAX_BYTES:,}"
        )
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from error
    try:
        return _Builder(YAML(typ="safe", pure=True).parse(io.StringIO(text)), source).document()
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise UserError(f"{source}{line}: not YAML: {problem}") from error
    except YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())[:200]}") from error


def write_yaml(value: Any) -> str:
    """A YAML text in block style that `read_yaml` reads back as `value`."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.width = 100
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda data: True
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def scalar(text: str) -> Any:
    """What a plain (unquoted) word means in the core schema."""
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return -math.inf if infinite[1] == "-" else math.inf
    return math.nan if text in _NAN else text


class _Builder:
    """Builds Python values from the parser's events, which come in order of the text."""

    def __init__(self, events: Iterator[Event], source: str) -> None:
        self.events = events
        self.source = source
        self.anchors: dict[str, Any] = {}
        self.values = 0

    def document(self) -> Any:
        self.next(StreamStartEvent)
        first = self.next()
        if isinstance(first, StreamEndEvent):
            return None
        if not isinstance(first, DocumentStartEvent) or first.version or first.tags:
            raise self.error(first, "directives (%YAML, %TAG) are not accepted")
        value = self.value(self.next(), 0)
        self.next(DocumentEndEvent)
        last = self.next()
        if not isinstance(last, StreamEndEvent):
            raise self.error(last, "a second document, expected one")
        return value

    def next(self, kind: type[Event] = Event) -> Event:
        event = next(self.events)
        assert isinstance(event, kind), event
        return event

    def error(self, event: Event, message: str) -> UserError:
        return UserError(f"{self.source}:{event.start_mark.line + 1}: {message}")

    def value(self, event: Event, depth: int) -> Any:
        self.count(event, 1)
        if depth > MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(event, f"*{event.anchor} refers to nothing above it")
            value, size = self.anchors[event.anchor]
            self.count(event, size)
            return copy.deepcopy(value)
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent), event
        if event.tag is not None:
            raise self.error(event, f"tags like {event.tag} are not accepted")
        before = self.values
        if isinstance(event, ScalarEvent):
            value = scalar(event.value) if event.implicit[0] else event.value
        elif isinstance(event, SequenceStartEvent):
            value = []
            while not isinstance(item := self.next(), SequenceEndEvent):
                value.append(self.value(item, depth + 1))
        else:
            value = self.mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def mapping(self, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := self.next(), MappingEndEvent):
            key = self.value(event, depth + 1)
            if not isinstance(key, str) or not key:
                raise self.error(event, f"got {key!r} as a key, expected a name")
            if key == "<<":
                raise self.error(event, "merge keys (<<) are not part of YAML 1.2: use `extends`")
            if key in mapping:
                raise self.error(event, f"the key '{key}' is repeated")
            mapping[key] = self.value(self.next(), depth + 1)
        return mapping

    def count(self, event: Event, values: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise self.error(event, f"more than {MAX_VALUES:,} values")
