"""YAML -> Recipe: `base` names a recipe to start from, the rest overrides it leaf by leaf.

    base: qlora_24gb             # a name in trainers/recipe_files, or a path beside this file
    optimizer: {epochs: 2.0}     # everything else is as in the base

Lists are replaced whole. A key that no recipe has, a key given twice and a value of the wrong type are refused.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from trainers.recipes import Recipe

NAMED = Path(__file__).parent / "recipe_files"


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number (as in YAML 1.2; PyYAML reads it as text), and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {', '.join(repeated)} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # A number with a point, an exponent or both: the core schema of YAML 1.2 without .inf and .nan.
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in NAMED.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a named recipe or a YAML file; `overrides` are "section.key=value", values written as in YAML.

    Raises ValueError with the file, the key and the nearest known key or the allowed values.

    Example:
        >>> load_recipe("paper_pretrain", ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate
        0.0001
        >>> load_recipe("paper_pretrain", ["optimizer.learning_rte=1e-4"])
        Traceback (most recent call last):
        ValueError: paper_pretrain: optimizer.learning_rte is not a key of a recipe. Nearest: optimizer.learning_rate.
    """
    mapping = _with_base(_find(str(name_or_path), Path()), chain=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} is not of the form section.key=value")
        value = _parse(text, f"--set {override}")
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        mapping = _merged(mapping, value)
    return _checked(mapping, str(name_or_path))


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default spelled out; `load_recipe` reads it back as an equal Recipe."""
    plain = json.loads(TypeAdapter(Recipe).dump_json(recipe))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _find(name_or_path: str, folder: Path) -> Path:
    """A path beside `folder`, or a named recipe. The suffix decides: no file can shadow a name."""
    path = folder / name_or_path if name_or_path.endswith((".yaml", ".yml")) else NAMED / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(
            f"There is no recipe {name_or_path} (looked for {path}). Give a path that ends in .yaml, or one of: "
            f"{', '.join(recipe_names())}.{_nearest(name_or_path, recipe_names())}"
        )
    return path


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from error


def _with_base(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ValueError(f"{path} is its own base: {' -> '.join(str(link) for link in (*chain, path.resolve()))}")
    mapping = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(mapping, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, not {type(mapping).__name__}")
    base = mapping.pop("base", None)
    if base is None:
        return mapping
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {base!r}; give the name or the path of a recipe")
    below = _with_base(_find(base, path.parent), (*chain, path.resolve()))
    return _merged(below, {"name": path.stem} | mapping)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _checked(mapping: Mapping[str, Any], source: str) -> Recipe:
    try:
        # By way of JSON: only there do pydantic's strict rules take a list for a tuple.
        return TypeAdapter(Recipe).validate_json(json.dumps(mapping))
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {line}" for line in map(_in_words, error.errors()))) from error


def _in_words(error: Any) -> str:
    key = ".".join(str(step) for step in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{key} is not a key of a recipe.{_nearest(key, list(_keys(Recipe)))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key} is {error['input']!r}: {error['msg'].lower()}"


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Nearest: {close[0]}." if close else f" Known: {', '.join(known)}."


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections included."""
    for entry in dataclasses.fields(section):
        yield prefix + entry.name
        # `Section`, `Section | None` and `tuple[Section, ...]` alike.
        for kind in (entry.type, *get_args(entry.type)):
            if is_pydantic_dataclass(kind):
                yield from _keys(kind, f"{prefix}{entry.name}.")
