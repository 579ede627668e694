"""A configuration from a TOML file and `--section.key=value` overrides, and back to TOML.

All problems are reported at once, each with its knob and what would mend it. Like `config.py` this
imports no torch.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_prime.config import ConfigError, RunConfig, Section

# Knobs that someone may look for under a name that is not theirs.
ELSEWHERE = {
    "model.precision": "set precision.policy.dtype, precision.prm.dtype, precision.reference.dtype",
}


def load(path: Path, overrides: list[str]) -> RunConfig:
    """Read `path`, apply `--section.key=value` overrides and check every key and type.

    Relative paths stay relative to the working directory. Values of overrides are TOML values; a
    bare word is a string. Raises ConfigError with all problems at once.
    """
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no config file {path}; give the path of a run's TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _apply_override(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not key:
        raise ConfigError(f"found {override!r}, wanted --section.key=value")
    *tables, leaf = key.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{override}: {table} is a value, not a table")
    try:
        data[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[leaf] = text


def _explain(problem: Any) -> str:
    knob = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        if knob in ELSEWHERE:
            return f"{knob}: no such knob; {ELSEWHERE[knob]}"
        return f"{knob}: no such knob; `python -m megatron_prime config RUN.toml` lists all"
    if problem["type"] == "missing":
        return f"{knob}: missing; set it in the TOML file or with --{knob}=…"
    return f"{knob}: found {problem['input']!r}, wanted: {problem['msg']}"


def describe(config: RunConfig) -> str:
    """The resolved configuration as TOML, each knob under its sentence."""
    lines = [f"# {line}" for line in [RunConfig.__doc__ or ""]]
    tables = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            tables += _describe_table(name, value)
        elif isinstance(value, dict):
            tables += ["", f"# {field.description}", f"[{name}]"]
            tables += [f"{key} = {_toml(item)}" for key, item in value.items()]
        else:
            lines += [f"# {field.description}", f"{name} = {_toml(value)}"]
    return "\n".join(lines + tables)


def _describe_table(name: str, section: Section) -> list[str]:
    lines = ["", f"# {(type(section).__doc__ or '').splitlines()[0]}", f"[{name}]"]
    inner = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Section):
            inner += _describe_table(f"{name}.{key}", value)
        else:
            lines += [f"# {line}" for line in (field.description or "").splitlines()]
            lines += [f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"]
    return lines + inner


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, (int, float)):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False)  # TOML has no surrogate pairs


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
