"""Settings as TOML: a file read into dotted names, and a configuration written out with its units."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safesteer_lite.config.layers import Values
from safesteer_lite.config.sections import SECTIONS, RunConfig
from safesteer_lite.errors import ConfigError
from safesteer_lite.runs.durable import read_bytes
from safesteer_lite.text import is_unicode

_LARGEST_FILE = 1 << 20
"""Bytes that a file of settings may have; they are a few thousand."""


def flatten(tables: Mapping[str, Any], origin: str, problems: list[str]) -> Values:
    """TOML tables as dotted names."""
    values: Values = {}
    for key, value in tables.items():
        if key in SECTIONS and isinstance(value, Mapping):
            values.update({f"{key}.{inner}": entry for inner, entry in value.items()})
        elif key == "preset":
            continue
        elif isinstance(value, Mapping):
            problems.append(f"{origin}: there is no section [{key}].")
        else:
            values[key] = value
    return values


def read_toml(path: Path) -> tuple[Values, str]:
    """Settings of a TOML file, and the preset it names (empty if none).

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        text = read_bytes(path, _LARGEST_FILE).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}.", "Name an existing TOML file with --config.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", "Name a TOML file with --config.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Name a UTF-8 TOML file with --config.") from None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Name a TOML file with --config.") from None
    return parse_toml(text, str(path))


def parse_toml(text: str, origin: str) -> tuple[Values, str]:
    """Settings written as TOML, and the preset they name (empty if none).

    Args:
        text: the content of a file.
        origin: what to call it.

    Raises:
        ConfigError: it is not TOML.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}.", "Correct that line and start again.") from None
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deeply.", "A setting is a value or a list of values.") from None
    except ValueError as error:
        raise ConfigError(f"{origin} cannot be read: {error}.", "Name a TOML file with --config.") from None
    problems: list[str] = []
    values = flatten(tables, origin, problems)
    if problems:
        raise ConfigError("The settings have problems:\n  " + "\n  ".join(problems), "Correct them and start again.")
    preset = tables.get("preset", "")
    if isinstance(preset, Mapping):
        preset = ""
    return values, str(preset)


def to_record(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""
    record = asdict(config)
    for section in SECTIONS:
        record[section] = {k: list(v) if isinstance(v, tuple) else v for k, v in record[section].items()}
    return record


def to_toml(config: RunConfig, preset: str = "", *, expert: bool = True) -> str:
    """The configuration as TOML, with units; reading it back gives the same configuration.

    Args:
        config: all settings.
        preset: the preset that they come from, to name it; empty for none.
        expert: whether to write the settings that hardly anybody wants to change; without them, reading it back gives the
            same only where they are as the recipe and the preset have them.

    Raises:
        ConfigError: a path in it is not text.
    """
    lines = [f"preset = {_toml(preset)}"] if preset else []
    lines += [f"recipe = {_toml(config.recipe)}", f"seed = {config.seed}"]
    for section in SECTIONS:
        table = getattr(config, section)
        shown = [item for item in fields(table) if expert or not item.metadata["expert"]]
        if shown:
            lines += ["", f"[{section}]"]
        for item in shown:
            lines.append(f"{item.name} = {_toml(getattr(table, item.name))}  # {item.metadata['unit']}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(
                f"{value} is not text in UTF-8, so config.toml cannot name it.", "Rename that file or folder."
            )
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        # TOML takes no control characters as they are.
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
