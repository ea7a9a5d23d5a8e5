"""`{configuration}`: every field of a configuration, from the models of `b2ray.config`.

A section of the configuration becomes a section of the page, a field a `confval`, which has an
anchor and stands in the index. The text of a field is its docstring.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from b2ray.config import Config
from b2ray.rewards.options import OPTIONS

BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


class Configuration(SphinxDirective):
    """All fields of `Config`, section by section; with `rewards`, the options of every kind."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The page's content as docutils nodes."""
        fields = ["## The run\n", *configuration(Config)]
        text = "\n".join(options() if self.arguments else fields)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def configuration(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Markdown: the fields of a section, then the sections below it."""
    below = []
    for name, field in model.model_fields.items():
        inner = section(field)
        if inner is None or listed(field):
            yield from value(f"{path}{name}", field)
        # A list of sections is explained once: held-out rewards are as those at the top.
        if inner is not None and not (listed(field) and path):
            below.append((f"{path}{name}{'[…]' if listed(field) else ''}", inner))
    for place, inner in below:
        yield from heading(place, inner)
        yield from configuration(inner, f"{place}.")


def heading(place: str, model: type[BaseModel]) -> Iterator[str]:
    """A section's title and what it is for."""
    level = 2 + place.count(".")
    yield f"({anchor(place)})=\n{'#' * level} {place}\n"
    told = model.__dict__.get("__doc__")
    if told:
        yield f"{inspect.cleandoc(told)}\n"


def options() -> Iterator[str]:
    """Markdown: the options of every kind of reward that has some."""
    for kind, model in OPTIONS.items():
        if not model.model_fields:
            continue
        yield f"### {kind}\n"
        for name, field in model.model_fields.items():
            yield from value(f"{kind}.options.{name}", field)


def value(place: str, field: FieldInfo) -> Iterator[str]:
    """A field: its type, bounds, default and docstring."""
    required = field.is_required()
    default = "required" if required else f"`{shown(field.get_default(call_default_factory=True))}`"
    yield f"::::{{confval}} {place}"
    yield f":type: {kind(field)}"
    yield f":default: {default}\n"
    yield f"{field.description or ''}\n::::\n"


def kind(field: FieldInfo) -> str:
    """The type for a person: words in the place of Python's, with bounds."""
    bounds = [
        f"{sign} {shown(getattr(found, name))}"
        for found in field.metadata
        for bound, (sign, name) in BOUNDS.items()
        if isinstance(found, bound)
    ]
    return ", ".join([spelt(field.annotation), *bounds])


def spelt(annotation: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([spelt(args[0]), *bounds_of(args[1:])])
    if origin is Literal:
        return " \\| ".join(f"`{arg}`" for arg in args)
    if origin in (typing.Union, types.UnionType):
        parts = ["empty" if arg is type(None) else spelt(arg) for arg in args]
        return " \\| ".join(parts)
    if origin is tuple:
        return f"list of {spelt(args[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return re.sub(r"(?<!^)(?=[A-Z])", " ", annotation.__name__).lower()
    names = {str: "text", int: "whole number", float: "number", bool: "`true` \\| `false`"}
    return names[annotation]


def bounds_of(metadata: tuple[Any, ...]) -> list[str]:
    """Bounds inside of a type."""
    found = []
    for entry in metadata:
        for constraint in getattr(entry, "metadata", [entry]):
            if isinstance(constraint, MinLen):
                found.append("not empty")
            for bound, (sign, name) in BOUNDS.items():
                if isinstance(constraint, bound):
                    found.append(f"{sign} {shown(getattr(constraint, name))}")
    return found


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, a list of sections, or one that may be empty."""
    for found in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return None


def listed(field: FieldInfo) -> bool:
    """Whether a field is a list of sections."""
    return typing.get_origin(field.annotation) is tuple


def shown(default: Any) -> str:
    """A value as YAML has it."""
    if default is None:
        return "empty"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(shown, default))}]"
    return "{}" if default == {} else f"{default:g}" if isinstance(default, float) else str(default)


def anchor(place: str) -> str:
    """A link's name for a section."""
    return "config-" + re.sub(r"[^a-z]+", "-", place.lower()).strip("-")


def setup(app: Sphinx) -> ExtensionMetadata:
    """What Sphinx calls."""
    app.add_directive("configuration", Configuration)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
