"""From nested mappings to frozen, validated dataclasses, and back.

A configuration file is data: it is read into a dataclass that lists every key, and anything else is an error
that names the key, what was expected and the nearest known name. No library says all three of them for dataclasses:
msgspec takes unknown keys, cattrs needs hooks for strict scalars and unions, pydantic reads `"1e-3"` as a number or, if
strict, takes no mapping; each of them costs more start-up time.

A default stands in the dataclass: it is what a configuration that lacks the key means, be it written by hand or stored
by an earlier version. The files under `conf/` show every key with the same value, which `tests` compare.
"""

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from attnres.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str | None:
    """The known name most like `name`, or None if none is alike; `likeness` is a ratio, 1 for the same name."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return matches[0] if matches else None


def unknown_key(path: str, name: str, known: Iterable[str], where: str = "") -> ConfigError:
    """The error for a key that does not exist.

    Args:
        path: full dotted path of the key as it was given.
        name: its last part.
        where: dotted path of the group, prefixed to the suggestion.
    """
    known = sorted(known)
    guess = nearest(name, known)
    remedy = f"did you mean {join(where, guess)!r}?" if guess else f"known keys: {', '.join(known)}"
    return ConfigError(f"unknown key {path!r}; {remedy}")


def strict_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose TypeError for an unknown keyword names the nearest one; before Python 3.13 it names none."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                guess = nearest(name, known)
                remedy = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
                raise TypeError(f"{function.__name__}: unknown argument {name!r}; {remedy}")
        return function(*args, **kwargs)

    return call


def join(where: str, key: str) -> str:
    """`where.key`, or `key` at the top."""
    return f"{where}.{key}" if where else key


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition`: for `__post_init__` of configuration dataclasses."""
    if not condition:
        raise ConfigError(message)


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from a nested mapping, strictly.

    Lists become tuples and ints become floats where the field asks for them; nothing else is converted.

    Args:
        cls: a dataclass type whose fields are annotated with bool, int, float, str, Literal, unions of these,
            tuple[X, ...], dict, Any or another dataclass.
        mapping: plain containers, as read from YAML.
        where: dotted path of `mapping` in the whole configuration, for messages.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value that the dataclass refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or 'configuration'}: expected a mapping, got {_describe(mapping)}")
    hints = typing.get_type_hints(cls)
    dataclass_type: Any = cls
    fields = {field.name: field for field in dataclasses.fields(dataclass_type) if field.init}
    for key in mapping:
        if key not in fields:
            raise _unknown_field(cls, str(key), where)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(mapping[name], hints[name], join(where, name))
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], {}, join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {join(where, name)!r}: set it to a {_name(hints[name])}")
    try:
        return cls(**values)
    except (ConfigError, ValueError, TypeError) as error:
        message = str(error)
        raise ConfigError(message if not where or message.startswith(where) else f"{where}.{message}") from error


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as plain dicts and lists, ready for JSON and YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def key(
    default: Any = dataclasses.MISSING,
    *,
    hashed: bool = True,
    as_before: Any = dataclasses.MISSING,
    may_differ: bool = False,
) -> Any:
    """A field of a configuration with what it decides, said where it stands; `decisive` and `agreeing` read it.

    Args:
        default: its value, or a callable without arguments that makes one (a dataclass, a dict); none for a key that
            must be given.
        hashed: whether it decides a result, and so the name of the folder; keys that say where and how something
            executes, or how often it is saved, do not.
        as_before: the value that asks for nothing beyond what a configuration without the key does. It is left out of
            the name, so that a key that is added later moves no folder. For a nested dataclass: its decisive part.
        may_differ: whether folders that belong together may differ in it: the members of one swept grid, or a run and
            the other run whose checkpoint it goes on from.
    """
    metadata = {"hashed": hashed, "as_before": as_before, "may_differ": may_differ}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def decisive(cls: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plain configuration that decides a result: what a folder is named by.

    Args:
        cls: the dataclass that it was built into, whose fields say what decides (`key`).
        plain: the configuration as plain containers, also one that another version stored: a key that `cls` lacks
            decides.
    """
    return _selected(cls, plain, lambda said: said.get("hashed", True))


def agreeing(cls: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `decisive(cls, plain)` in which folders that belong together agree."""
    return _selected(cls, plain, lambda said: said.get("hashed", True) and not said.get("may_differ"))


def _selected(cls: Any, plain: Mapping[str, Any], chosen: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """The keys, at any depth, that are chosen by what their fields say and hold another value than `as_before`."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    kept: dict[str, Any] = {}
    for name, value in plain.items():
        said = fields[name].metadata if name in fields else {}
        if not chosen(said):
            continue
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(name)):
            value = _selected(hints[name], value, chosen)
        as_before = said.get("as_before", dataclasses.MISSING)
        if as_before is dataclasses.MISSING or value != to_plain(as_before):
            kept[name] = value
    return kept


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two plain configurations differ, each with both values (None where absent)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        paths = []
        for name in sorted({*old, *new}):
            paths += differences(old.get(name), new.get(name), join(where, name))
        return paths
    return [] if old == new else [(where, old, new)]


def _unknown_field(cls: Any, key: str, where: str) -> ConfigError:
    """Suggests a key of that name in a group below (`lr` is `optim.lr`), else the nearest name here."""
    names = [field.name for field in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    for group in names:
        inner = hints[group]
        if dataclasses.is_dataclass(inner) and key in {field.name for field in dataclasses.fields(inner)}:
            meant = join(where, join(group, key))
            return ConfigError(f"unknown key {join(where, key)!r}; did you mean {meant!r}?")
    return unknown_key(join(where, key), key, names, where)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            guess = nearest(value, [str(choice) for choice in arguments]) if isinstance(value, str) else None
            hint_text = f"; did you mean {guess!r}?" if guess else ""
            choices = ", ".join(map(repr, arguments))
            raise ConfigError(f"{where}: expected one of {choices}, got {value!r}{hint_text}")
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _convert(value, choice, where)
            except ConfigError:
                continue
        raise ConfigError(f"{where}: expected {_name(hint)}, got {_describe(value)}")
    if origin is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            pairs = zip(value, arguments, strict=True)
            return tuple(_convert(item, inner, f"{where}[{i}]") for i, (item, inner) in enumerate(pairs))
    if (origin is dict or hint is dict) and isinstance(value, Mapping):
        return to_plain(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, never to somebody who writes a configuration.
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {_name(hint)}, got {_describe(value)}")


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(choice) for choice in arguments)
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin is tuple:
        return f"list of {_name(arguments[0])}" if arguments[-1] is Ellipsis else f"list of {len(arguments)} values"
    return getattr(hint, "__name__", str(hint))


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"
