"""Build the configuration dataclasses from YAML files and command-line flags.

Precedence: defaults, then the YAML file, then flags. A flag is the field's name with dashes (underscores work too),
plus the aliases in the field's metadata. YAML keys are field names or aliases, at the top level or under their
section's name; unknown and duplicate keys are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from csm_fast.system.errors import InputError
from csm_fast.system.files import read_text

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> typing.NoReturn:
        mend = f"see {self.prog} --help"
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown and message != unknown[0] and unknown[0].startswith("-"):
            flag = unknown[0].split("=")[0].replace("_", "-")
            close = difflib.get_close_matches(flag, self._option_string_actions, 1)
            mend = f"did you mean {close[0]}?" if close else mend
        raise InputError(f"{self.prog}: {message}", mend=mend)


# -------------------------------------------------------------------------------------------------------- dataclass


def list_settings(cls: type) -> Iterator[tuple[str | None, dataclasses.Field, Any]]:
    """(section or None, field, type) of every setting in a dataclass and in the dataclasses among its fields.

    A section has the name of the innermost of these. A setting of the outer dataclass takes the place of an inner one
    of the same name.
    """
    hints = typing.get_type_hints(cls)
    nested = [f.name for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])]
    own = {f.name: f for f in dataclasses.fields(cls) if f.name not in nested}
    inner = {name: list(list_settings(hints[name])) for name in nested}
    placed = own.keys() & {f.name for found in inner.values() for _, f, _ in found}
    for f in dataclasses.fields(cls):
        if f.name in own and f.name not in placed:
            yield None, f, hints[f.name]
        for section, setting, hint in inner.get(f.name, ()):
            name = setting.name
            yield section or f.name, own.get(name, setting), hints[name] if name in own else hint


def list_names(field: dataclasses.Field) -> list[str]:
    """A field's name and aliases, with underscores."""
    return [field.name, *(a.replace("-", "_") for a in field.metadata.get("alias", ()))]


def build(cls: type[T], values: dict[str, Any]) -> T:
    """An instance from flat values by field name; dataclass checks run."""
    hints = typing.get_type_hints(cls)
    own = {f.name for f in dataclasses.fields(cast(Any, cls)) if not dataclasses.is_dataclass(hints[f.name])}
    kwargs = {name: value for name, value in values.items() if name in own}
    inner = {name: value for name, value in values.items() if name not in own}
    for f in dataclasses.fields(cast(Any, cls)):
        if f.name not in own:
            kwargs[f.name] = build(hints[f.name], inner)
    return cls(**kwargs)


def coerce(value: Any, hint: Any, where: str, file: str | None = None) -> Any:
    """``value`` as the annotated type, or an ``InputError`` that says what was expected.

    Text is converted, because flags are text and YAML reads ``3e-5`` as text.
    """

    def wrong(expected: str) -> InputError:
        return InputError(f"{where} is {value!r}", file=file, mend=f"give {expected}")

    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return coerce(value, next(a for a in typing.get_args(hint) if a is not type(None)), where, file)
    if origin is Literal:
        if isinstance(value, bool) and "off" in typing.get_args(hint):
            # YAML reads bare on and off as booleans. For an option that used to be boolean, true is the highest level.
            value = next(w for w in ("on", "full", "all") if w in typing.get_args(hint)) if value else "off"
        if value not in typing.get_args(hint):
            raise wrong("one of " + ", ".join(map(str, typing.get_args(hint))))
        return value
    if origin is list:
        items = value if isinstance(value, list) else [value]
        items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        inner = typing.get_args(hint)[0]
        return [coerce(i.strip() if isinstance(i, str) else i, inner, where, file) for i in items if i != ""]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise wrong("true or false")
    if hint in (int, float):
        expected = "an integer" if hint is int else "a number"
        if isinstance(value, bool):
            raise wrong(expected)
        try:
            number = float(value)
            if hint is int:
                number = int(value) if isinstance(value, str | int) else number
                if number != int(number):
                    raise ValueError
                return int(number)
            return number
        except (TypeError, ValueError, OverflowError):
            raise wrong(expected) from None
    if not isinstance(value, str):
        raise wrong("text")
    return value


# ------------------------------------------------------------------------------------------------------------- YAML


def parse_yaml(text: str, file: str | os.PathLike[str]) -> Any:
    """A YAML (or JSON) document of plain values. ``file`` is named in errors.

    Raises:
        InputError: what is not YAML, a key that is there twice, or one that is not a scalar.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a key that is not a name", problem_mark=key.start_mark)
                if key.value in seen:
                    row = key.start_mark.line + 1
                    raise InputError(f"the key {key.value} is there twice", file=file, row=row, mend="keep one")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        row = mark.line + 1 if mark else None
        problem = getattr(error, "problem", None) or getattr(error, "reason", "damaged")
        raise InputError(f"is not YAML ({problem})", file=file, row=row, mend="correct it there") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a date that no calendar has; brackets thousands deep
        raise InputError(f"is not usable YAML ({error})", file=file, mend="correct it") from None


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML or JSON mapping from a file; an ``InputError`` for anything else."""
    values = parse_yaml(read_text(Path(path).expanduser()), path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError("holds no mapping of settings", file=path, mend="write lines like learning_rate: 3e-5")
    return values


def read_yaml(path: str | os.PathLike[str], cls: type) -> dict[str, Any]:
    """Flat values by field name from a YAML file, flat or in sections."""
    settings = list(list_settings(cls))
    known = {alias: (section, field.name, hint) for section, field, hint in settings for alias in list_names(field)}
    sections = {section for section, _, _ in settings if section}
    file, flat = str(path), {}

    def take(key: Any, value: Any, under: str | None = None) -> None:
        key = str(key).replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            mend = f"did you mean {close[0]}?" if close else "remove it; csm-fast-train --help lists the settings"
            raise InputError(f"unknown setting {key}", file=file, mend=mend)
        section, name, hint = known[key]
        if under and section != under:
            raise InputError(f"{key} is no setting of {under}", file=file, mend=f"put it under {section}")
        if name in flat:
            raise InputError(f"{name} is set twice", file=file, mend="keep one")
        flat[name] = coerce(value, hint, name, file)

    for key, value in read_mapping(path).items():
        if isinstance(value, dict) and str(key) in sections:
            for inner, inner_value in value.items():
                take(inner, inner_value, str(key))
        elif value is not None and str(key) in sections and str(key) not in known:
            raise InputError(f"{key} must be a section of settings", file=file, mend="indent them below it")
        elif not (value is None and str(key) in sections):  # a section without settings
            take(key, value)
    return flat


RESOLVED = "# Every setting of a run, written by csm_fast.\n"


def dump_yaml(config: Any) -> str:
    """The resolved configuration as YAML, in sections; ``read_yaml`` reads it back."""
    import yaml

    return RESOLVED + yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------------------ flags


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one flag per field. Values stay text until ``coerce``, as YAML's do. ``cls.OTHER_FLAGS`` lists further flags
    as (spellings, arguments of ``add_argument``), which the help does not show."""
    for section, field, hint in list_settings(cls):
        default = field.default if field.default is not dataclasses.MISSING else None
        group: Any = parser
        if section:
            title = f"{section} settings"
            found = [g for g in parser._action_groups if g.title == title]
            group = found[0] if found else parser.add_argument_group(title)
        text = field.metadata.get("help", "").replace("%", "%%")
        if default not in (None, False, ""):
            text += f" (default: {default:.6g})" if isinstance(default, float) else f" (default: {default})"
        kwargs: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if hint is bool:
            kwargs["action"] = "store_true"
        elif typing.get_origin(hint) is list:
            kwargs.update(nargs="+", action="extend", metavar="X")
        elif typing.get_origin(hint) is Literal:
            kwargs["metavar"] = "|".join(typing.get_args(hint))
            if "bare" in field.metadata:
                kwargs.update(nargs="?", const=field.metadata["bare"])
        else:
            numeric = {int, float} & {hint, *typing.get_args(hint)}
            kwargs["metavar"] = field.metadata.get("metavar") or ("N" if numeric else "X")
        shown, *hidden = _spellings(field)
        short = [s for s in hidden if not s.startswith("--")]
        group.add_argument(*short, shown, help=text, **kwargs)
        hidden = [s for s in hidden if s.startswith("--")]
        if hint is bool or "bare" in field.metadata:
            negative = {"dest": field.name, "default": argparse.SUPPRESS}
            negative.update({"action": "store_false"} if hint is bool else {"action": "store_const", "const": "off"})
            first = "--no-" + shown.removeprefix("--")
            group.add_argument(
                first, help=f"({shown} is the default)" if default is True else argparse.SUPPRESS, **negative
            )
            if hidden:
                group.add_argument(*("--no-" + s[2:] for s in hidden), help=argparse.SUPPRESS, **negative)
        if hidden:
            group.add_argument(*hidden, help=argparse.SUPPRESS, **kwargs)
    for spellings, settings in getattr(cls, "OTHER_FLAGS", ()):
        parser.add_argument(*spellings, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **settings)


def _spellings(field: dataclasses.Field) -> list[str]:
    """The flag shown in the help, then the other spellings: underscores and aliases."""
    found = []
    for name in list_names(field):
        dashes = "--" if len(name) > 1 else "-"
        found += [dashes + name.replace("_", "-"), dashes + name]
    return list(dict.fromkeys(found))


def from_flags(cls: type[T], namespace: argparse.Namespace, config_file: str | None = None) -> T:
    """The configuration from parsed flags over an optional YAML file."""
    values = read_yaml(config_file, cls) if config_file else {}
    given = vars(namespace)
    for _, field, hint in list_settings(cls):
        flag = "--" + field.name.replace("_", "-")
        if field.name in given:
            values[field.name] = coerce(given[field.name], hint, flag)
        elif has_no_default(field) and field.name not in values:
            raise InputError(f"{flag} is missing", mend=field.metadata.get("help"))
    try:
        return build(cls, values)
    except InputError as error:
        # The error comes from a check of values. Name the file if a setting that the error names came from it.
        from_file = values.keys() - given.keys() if config_file else set()
        words = set(re.findall(r"\w+", error.what.replace("-", "_")))
        if error.file is None and words & from_file:
            raise InputError(error.what, file=config_file, mend=error.mend) from None
        raise


def has_no_default(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
