"""Say in a line what is wrong with a configuration: which option, which value, and what was probably meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse.typing import import_object

_NOTHING = object()
_SIMILAR = 0.7  # below, a suggestion is more often wrong than right
_NAMES = {"NoneType": "null", "bool": "true or false", "str": "text", "Sequence": "list", "tuple": "list"}
_PACKAGES = ("lightning_embcomp", "lightning.pytorch")
_PLACES = (
    "lightning_embcomp",
    "lightning_embcomp.data",
    "lightning_embcomp.models",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
)  # where classes are that a configuration may name without their path


def explain_error(message: str, options: Iterable[str]) -> str:
    """Shorten a message of jsonargparse, and add what was probably meant.

    Args:
        message: The message.
        options: Known options, each with its leading dashes.

    Returns:
        The new message; one that is not understood as it is.

    Example:
        >>> explain_error("unrecognized arguments: --modle.embedding_dim 8", ["--model", "--trainer.max_epochs"])
        "unknown option '--modle.embedding_dim'; did you mean '--model.embedding_dim'?"
    """
    found = (
        _class_option(message)
        or _group_option(message)
        or _class_path(message)
        or _wrong_value(message)
        or _syntax(message)
        or _option(message, list(options))
    )
    return found or message


def file_with(option: str, files: Sequence[str]) -> str | None:
    """The last of the configuration files that sets an option.

    Args:
        option: The option, its levels separated by dots.
        files: The files, in the order of the command line.
    """
    for file in reversed(files):
        level = yaml.safe_load(Path(file).read_text())
        for key in option.split("."):
            level = level.get(key, _NOTHING) if isinstance(level, dict) else _NOTHING
        if level is not _NOTHING:
            return file
    return None


def suggestion(name: str, names: Iterable[str]) -> str:
    """The most similar of the names, as a question to put behind a message; empty if none is similar.

    Example:
        >>> suggestion("targt", ["target", "tables"])
        "; did you mean 'target'?"
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=_SIMILAR)
    return f"; did you mean {close[0]!r}?" if close else ""


def _class_option(message: str) -> str | None:
    of_class = re.search(r"given class_path '([\w.]+)':\s+Option '([\w.+]+)' is not accepted", message)
    if not of_class:
        return None
    class_path, option = of_class.groups()
    entry = option.partition(".")[0]
    if class_path == "lightning.Callback":  # stands for an entry of the list that names no class
        hint = suggestion(entry, ["class_path", "init_args"])
        return (
            f"an entry of callbacks has no key {entry!r}{hint}"
            if hint
            else f"no callback of the configuration has the option {option!r}: name its class first, with"
            " --trainer.callbacks+=CLASS or in a file"
        )
    known = list(inspect.signature(import_object(class_path)).parameters)
    return f"{class_path} has no option {option!r}{suggestion(entry, known) or suggestion(option, known)}"


def _group_option(message: str) -> str | None:
    """An option of a group of settings, which a class takes as one argument."""
    of_group = re.search(
        r"given class_path '([\w.]+)':\s+(?:Group '([\w.]+)' does not accept option '([\w.]+)'"
        r"|unrecognized arguments: --([\w.]+)\.(\w+))",
        message,
    )
    if not of_group:
        return None
    class_path, group, option = of_group[1], of_group[2] or of_group[4], of_group[3] or of_group[5]
    parameter = inspect.signature(import_object(class_path)).parameters.get(group)
    names = [
        name
        for kind in _classes(parameter.annotation if parameter else None)
        for name in inspect.signature(kind).parameters
    ]
    return f"{group} of {class_path} has no option {option!r}{suggestion(option, names)}"


def _classes(annotation: Any) -> list[type]:  # noqa: ANN401
    return [kind for kind in (annotation, *get_args(annotation)) if inspect.isclass(kind)]


def _class_path(message: str) -> str | None:
    short = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if short:
        hint = suggestion(short[1], {name for place in _PLACES for name in _class_names(place)})
        return f"there is no class {short[1]!r}{hint or '; write its full path, such as my_package.MyClass'}"
    attribute = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
    if attribute:
        module, name = attribute.groups()
        close = difflib.get_close_matches(name, _class_names(module), n=1, cutoff=_SIMILAR)
        hint = f"; did you mean '{module}.{close[0]}'?" if close else ""
        return f"{module} has no class {name!r}{hint}"
    missing = re.search(r"No module named '([\w.]+)'", message)
    if missing:
        return f"there is no module {missing[1]!r}{suggestion(missing[1], _PACKAGES)}"
    return None


def _class_names(place: str) -> list[str]:
    module = importlib.import_module(place)
    return [name for name in getattr(module, "__all__", dir(module)) if inspect.isclass(getattr(module, name, None))]


def _wrong_value(message: str) -> str | None:
    """A value of the wrong type: the message nests one report per class and alternative; the deepest is the reason."""
    keys = list(re.finditer(r'^([ -]*)Parser key "([\w.+]+)":', message, re.MULTILINE))
    if not keys:
        return None
    deepest = max(keys, key=lambda key: len(key[1]))
    path: list[re.Match[str]] = []
    for key in keys[: keys.index(deepest) + 1]:
        path = [outer for outer in path if len(outer[1]) < len(key[1])] + [key]
    reason = message[deepest.end() :]
    wanted, value = _wanted(reason), _value(reason)
    if not wanted or value is None:
        return None
    name = ".".join(key[2] for key in path)
    owners = re.findall(r"Problem with given class_path '([\w.]+)'", message[: deepest.start()])
    of = f" of {owners[-1]}" if owners and len(path) > 1 else ""
    choices = [
        choice for literal in re.findall(r"Literal\[(.*?)\]", reason) for choice in re.findall(r"'(.*?)'", literal)
    ]
    return f"{name}{of} takes {wanted}, not {value!r}{suggestion(value, choices)}"


def _wanted(reason: str) -> str:
    union = re.search(r"^\s*Subtypes: \[(.*)\]$", reason, re.MULTILINE)
    single = re.search(r"Expected an? (.+?)(?:\. Got value|$)", reason, re.MULTILINE)
    types = union[1] if union else single[1] if single else ""
    types = re.sub(r"<class '([\w.]+)'>", lambda found: found[1], types)
    types = re.sub(r"(?:[a-z_]\w*\.)+(?=[A-Z])", "", types)  # modules in front of classes
    types = re.sub(r"Literal\[(.*?)\]", lambda found: found[1], types)
    parts = [part.strip() for part in re.split(r",\s*(?![^\[]*\])", types) if part.strip()]
    named = list(dict.fromkeys(_NAMES.get(part, part) for part in parts))
    return " or ".join([", ".join(named[:-1]), named[-1]]) if len(named) > 1 else "".join(named)


def _value(reason: str) -> str | None:
    given = re.search(r"(?:Given value|Got value): (.*)$", reason, re.MULTILINE)
    if not given:
        return None
    nested = re.fullmatch(r"NestedArg\(key='.*?', val=(.*)\)", given[1])
    return nested[1].strip("'") if nested else given[1]


def _syntax(message: str) -> str | None:
    missing = re.fullmatch(r'Parser key "config": File does not exist: \'(.*)\'', message)
    if missing:
        return f"{missing[1]}: there is no such file"
    if message.startswith("Unexpected config:"):
        return "it holds no options: write them by name, such as 'trainer: {max_epochs: 3}'"
    if not message.startswith("Problems parsing config:"):
        return None
    places = re.findall(r"line (\d+), column (\d+)", message)
    what = [line for line in message.partition(":")[2].strip().splitlines() if not line.strip().startswith("in ")]
    where = f"line {places[-1][0]}, column {places[-1][1]}: " if places else ""
    return f"{where}this is no YAML: {', '.join(line.strip() for line in what)}"


def _option(message: str, options: Sequence[str]) -> str | None:
    unknown = re.search(r"unrecognized arguments: (--[\w.+-]+)|does not accept option '([\w.+]+)'", message)
    if not unknown:
        extra = re.search(r"unrecognized arguments: (\S+)", message)
        return f"{extra[1]!r} is no option: options start with '--' or '-c'" if extra else None
    option = unknown[1] or f"--{unknown[2]}"
    head, dot, tail = option.partition(".")
    heads = {name.partition(".")[0] for name in options}
    if head in heads:
        hint = suggestion(option, options)
    else:
        close = difflib.get_close_matches(head, sorted(heads), n=1, cutoff=_SIMILAR)
        hint = f"; did you mean '{close[0]}{dot}{tail}'?" if close else ""
    return f"unknown option {option!r}{hint}"
