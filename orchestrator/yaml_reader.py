"""YAML as dinoctl reads it: YAML 1.2's core schema, plain values only, bounded in size, depth and expansion.

PyYAML parses; its resolvers are those of YAML 1.1 (`5e-5` a string, `on` and `no` booleans), so values are resolved
here. Nothing is constructed but None, bool, int, float, str, list and dict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from orchestrator.problems import Path, Problem, SpecError, shown

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
"""After every alias is expanded. The largest job file here has about 400."""
MAX_DEPTH = 40

_CORE = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_TAGS = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}


@dataclass(frozen=True)
class Document:
    """A mapping, and the line (from 1) of each of its paths: a key's own line, or that of an item of a list."""

    values: dict[str, Any]
    lines: dict[Path, int]


@dataclass
class _Node:
    """`value`: a scalar, a list of nodes or a dict of nodes. `size` and `depth` count what aliases expand to."""

    line: int
    value: Any
    size: int = 1
    depth: int = 1
    key_lines: dict[str, int] = field(default_factory=dict)

    def add(self, child: _Node) -> None:
        self.size += child.size
        self.depth = max(self.depth, child.depth + 1)


def read_yaml(file: str) -> Document:
    """The mapping in `file`. Raises SpecError with every mistake that could be found."""
    try:
        with FilePath(os.path.expanduser(file)).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError([Problem(f"cannot be read: {reason}", file=file)]) from error
    return parse_yaml(data, file)


def parse_yaml(data: bytes, file: str) -> Document:
    """As `read_yaml`, from the bytes of a file that errors call `file`."""
    if len(data) > MAX_BYTES:
        allowed = f"{MAX_BYTES} bytes (1 MiB)"
        raise SpecError([Problem("too large for a spec", file=file, found=f"over {MAX_BYTES} bytes", allowed=allowed)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError([Problem(f"not UTF-8 text: byte {error.start}", file=file)]) from error
    root = _compose(text, file)
    if root is None or not isinstance(root.value, dict):
        found = "nothing" if root is None or root.value is None else shown(_plain(root, (), {}))
        raise SpecError([Problem("must be a mapping (key: value)", file=file, found=found)])
    lines: dict[Path, int] = {}
    return Document(_plain(root, (), lines), lines)


def dump(values: Mapping[str, Any]) -> str:
    """`values` as YAML that reads back the same, here and in readers of YAML 1.1."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Quotes what this reader would take for something other than text; writes values out instead of aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_resolve(text), str) else "'"
    return dumper.represent_scalar(_CORE + "str", text, style)


_Dumper.add_representer(str, _text)


def parse_value(text: str, where: str) -> Any:
    """One value, as behind the `=` of an override. Raises SpecError naming `where`."""
    root = _compose(text, where)
    return None if root is None else _plain(root, (), {})


def _compose(text: str, file: str) -> _Node | None:
    """The only document of `text`, checked; None if there is none."""
    composer = _Composer(file)
    try:
        root = composer.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise SpecError([Problem(f"not YAML: {what}", file=file, line=mark.line + 1 if mark else None)]) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets a bad \U escape through as ValueError
        raise SpecError([Problem(f"not YAML: {' '.join(str(error).split())}", file=file)]) from error
    if composer.problems:
        raise SpecError(composer.problems)
    if root is not None:
        _check_expansion(root, file)
    return root


def _check_expansion(root: _Node, file: str) -> None:
    if root.size > MAX_NODES:
        found = f"{root.size} values" if root.size < 10**9 else "billions of values"
        raise SpecError([Problem("a YAML bomb: its aliases expand to too much", file=file, found=found,
                                 allowed=f"{MAX_NODES} values")])  # fmt: skip
    if root.depth > MAX_DEPTH:
        raise SpecError([_too_deep(file, root.line)])


def _too_deep(file: str, line: int) -> Problem:
    return Problem("nested too deeply", file=file, line=line, allowed=f"{MAX_DEPTH} levels")


class _Composer:
    """Nodes from PyYAML's events, without recursion, so that no depth of nesting can exhaust the stack."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Node | None] = {}  # None: begun, not complete
        self.count = 0

    def document(self, events: Iterator[yaml.Event]) -> _Node | None:
        root: _Node | None = None
        open_nodes: list[tuple[_Node, str | None, list[_Node]]] = []  # node, its anchor, its children so far
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                self._stop("more than one document", event, "keep one, without `---` between")
            if isinstance(event, yaml.CollectionStartEvent):
                self._begin(event, open_nodes)
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                done = self._end(open_nodes)
            elif isinstance(event, yaml.NodeEvent):
                done = self._leaf(event)
            else:
                continue
            if open_nodes:
                open_nodes[-1][2].append(done)
            else:
                root = done
        return root

    def _begin(self, event: Any, open_nodes: list[tuple[_Node, str | None, list[_Node]]]) -> None:
        kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", _CORE + kind):
            self._bad_tag(event)
        if len(open_nodes) >= MAX_DEPTH:
            raise SpecError([*self.problems, _too_deep(self.file, _line(event))])
        if event.anchor:
            self.anchors[event.anchor] = None
        open_nodes.append((_Node(_line(event), {} if kind == "map" else []), event.anchor, []))
        self._counted(event)

    def _end(self, open_nodes: list[tuple[_Node, str | None, list[_Node]]]) -> _Node:
        node, anchor, children = open_nodes.pop()
        if isinstance(node.value, list):
            node.value.extend(children)
            for child in children:
                node.add(child)
        else:
            for key, child in zip(children[::2], children[1::2], strict=True):
                self._entry(node, key, child)
        if anchor:
            self.anchors[anchor] = node
        return node

    def _entry(self, node: _Node, key: _Node, child: _Node) -> None:
        if not isinstance(key.value, str):
            found = shown(key.value) if not isinstance(key.value, list | dict) else "a list or mapping"
            self._problem("a key must be text", key.line, found=found, hint="put it in quotes")
        elif key.value in node.value:
            first = node.key_lines[key.value]
            self._problem(f"key {shown(key.value)} is there twice", key.line, found=f"first on line {first}",
                          hint="keep one of them")  # fmt: skip
        else:
            node.value[key.value] = child
            node.key_lines[key.value] = key.line
            node.add(child)

    def _leaf(self, event: Any) -> _Node:
        self._counted(event)
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(str(event.anchor), _ABSENT)
            if known is None:
                self._stop(f"*{event.anchor} stands inside what it names", event, "write the value out")
            if known is _ABSENT:
                self._stop(f"*{event.anchor} names no anchor above it", event, f"write &{event.anchor} before a value")
            assert known is not None
            return known
        node = _Node(_line(event), self._scalar(event))
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _scalar(self, event: Any) -> Any:
        text, plain = event.value, event.implicit[0] and event.tag is None
        if bad := _CONTROL.search(text):
            self._problem("a control character", _line(event), found=shown(bad[0]), hint="remove it")
            return ""
        if event.tag in (None, "!"):
            return self._number(event, _resolve(text)) if plain else text
        kind = _TAGS.get(event.tag.removeprefix(_CORE)) if event.tag.startswith(_CORE) else None
        if kind is None:
            self._bad_tag(event)
            return text
        value = text if kind is str else self._number(event, _resolve(text))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self._problem(f"not a !!{event.tag.removeprefix(_CORE)}", _line(event), found=shown(text))
        return value

    def _number(self, event: Any, value: Any) -> Any:
        if type(value) is int and not -(2**63) <= value < 2**63:
            self._problem("a whole number beyond 64 bits", _line(event), found=shown(event.value))
            return 0
        return value

    def _bad_tag(self, event: Any) -> None:
        tag = event.tag.replace(_CORE, "!!", 1)
        self._problem(f"the tag {shown(tag)} is refused", _line(event), allowed="plain values only",
                      hint="remove the tag: a spec holds values, never objects")  # fmt: skip

    def _counted(self, event: Any) -> None:
        self.count += 1
        if self.count > MAX_NODES:
            self._stop("too many values for a spec", event, f"at most {MAX_NODES} are read")

    def _problem(self, message: str, line: int, found: str = "", allowed: str = "", hint: str = "") -> None:
        self.problems.append(Problem(message, (), self.file, line, found, allowed, hint))

    def _stop(self, message: str, event: Any, hint: str) -> None:
        self._problem(message, _line(event), hint=hint)
        raise SpecError(self.problems)


_ABSENT = _Node(0, None)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _resolve(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema (section 10.3.2)."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        if len(text) > 30:
            return 10**30  # beyond 64 bits whatever it is; Python itself refuses to read thousands of digits
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _plain(node: _Node, path: Path, lines: dict[Path, int]) -> Any:
    """The node's value, aliases expanded; `lines` gets the line of every path under it."""
    if isinstance(node.value, dict):
        lines.update({(*path, key): line for key, line in node.key_lines.items()})
        return {key: _plain(child, (*path, key), lines) for key, child in node.value.items()}
    if isinstance(node.value, list):
        lines.update({(*path, index): child.line for index, child in enumerate(node.value)})
        return [_plain(child, (*path, index), lines) for index, child in enumerate(node.value)]
    return node.value
