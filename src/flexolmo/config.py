"""Recipes: a TOML file and overrides to a validated, frozen settings object.

Knows no setting by name; each room declares its own as a pydantic model that forbids unknown keys.
"""

import difflib
import ipaddress
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from flexolmo.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)
RECIPES = Path(__file__).parent / "recipes"


class Settings(BaseModel):
    """Settings that are frozen once read, and take no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_loopback(host: str) -> bool:
    """True if only this machine reaches `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_recipe(path: Path | None, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """The recipe in `path` (none: all defaults) with `overrides` such as "train.steps=10".

    Raises ConfigError that lists every unknown key and bad value.
    """
    values = {} if path is None else _read(path)
    for text in overrides:
        _override(values, text)
    where = str(path or "the command line")
    if path is not None and overrides:
        where += f", with {', '.join(overrides)} from the command line"
    return parse_settings(_merge(_defaults(schema), values), schema, where)


def find_recipe(name: Path | str) -> Path:
    """The file of a recipe that comes with FlexOlmo, by a name such as expert_private or
    paper/expert; any other `name` is the path of one's own. ConfigError for one without an ending
    that is neither."""
    shipped = RECIPES / f"{name}.toml"
    if shipped.is_file():
        return shipped
    if not Path(name).suffix and not Path(name).exists():
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.toml"))
        raise ConfigError(
            f"{name} is neither a file nor a recipe that comes with FlexOlmo: {', '.join(known)}."
        )
    return Path(name)


def has_key(path: Path, key: str) -> bool:
    """True if the recipe in `path` has this section or value; ConfigError as `read_recipe`."""
    return key in _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Name a TOML file.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path} is not readable TOML: {e}.") from None


def parse_settings(values: dict[str, Any], schema: type[Schema], where: str) -> Schema:
    """`values` as a `schema`; ConfigError names every key that does not fit."""
    try:
        return schema.model_validate(values)
    except ValidationError as e:
        problems = e.errors()
        places = {problem["loc"] for problem in problems}
        # of a list without a good item pydantic says too that it is too short
        repeated = {place[:n] for place in places for n in range(len(place))}
        lines = [
            _explain(problem, schema) for problem in problems if problem["loc"] not in repeated
        ]
        raise ConfigError(f"In {where}:\n  " + "\n  ".join(lines)) from None


def _override(values: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"Override {text!r} is not of the form section.key=value.")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"Override {text!r}: {section} is a value, not a section.")
    values[last] = value


def _defaults(schema: type[BaseModel]) -> dict[str, Any]:
    try:
        return schema().model_dump(mode="json")
    except ValidationError:  # something in it must be given
        return {}


def _merge(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section; a section of another kind has none of these."""
    if given.get("kind", defaults.get("kind")) != defaults.get("kind"):
        return given
    merged = {**defaults, **given}
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            merged[key] = _merge(defaults[key], value)
    return merged


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    # pydantic names a section's kind as if it were one more
    tags = {"evidence", "linear", "discriminant"}
    where = ".".join(str(part) for part in problem["loc"] if part not in tags)
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        if isinstance(problem.get("input"), dict):  # of a whole section: its values say nothing new
            return f"{where}: {message}." if where else f"{message}."
        return f"{where}: {message}, found {problem.get('input')!r}."
    known = _known_keys(schema)
    near = difflib.get_close_matches(where, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Known keys: {', '.join(known)}."
    return f"{where}: unknown key.{hint}"


def _known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        inner = [
            t
            for t in (field.annotation, *get_args(field.annotation))
            if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        for section in inner:
            keys += [k for k in _known_keys(section, f"{prefix}{name}.") if k not in keys]
        if not inner:
            keys.append(prefix + name)
    return keys
