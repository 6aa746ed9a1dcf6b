"""Options of the command line, made from the fields of plans."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from interp.errors import UsageError
from interp.hooks.limits import shortened

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, folder with safetensors, .gguf file, or demo.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder; an unfinished run in it is continued.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU where there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by default float32 on a CPU, and the type of the stored weights on a GPU."
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Whether prompts begin with BOS; by default as the tokenizer begins them."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens that a prompt and its reply may have; by default the context of the model."),
]
T = TypeVar("T")


def with_options(plan: str, *without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a plan.

    Args:
        plan: "module:class"; the fields of dataclasses inside of it become options too.
        without: Fields that the command has parameters for.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        module, _, name = plan.partition(":")
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = [
            _parameter(*found)
            for found in _leaves(getattr(import_module(module), name))
            if found[0].name not in without
        ]

        @wraps(command)
        def called(**given: Any) -> None:
            command(**given)

        # keyword-only ones may come in any order; arguments keep theirs
        every = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*own, *made)]
        called.__signature__ = inspect.Signature(every)  # pyright: ignore[reportAttributeAccessIssue]
        return called

    return decorate


def from_options(plan: type[T], options: Mapping[str, Any], **more: Any) -> T:
    """The plan that options describe.

    Args:
        plan: A dataclass.
        options: Values of the options that `with_options` made.
        more: Fields that are given as they are.

    Raises:
        UsageError: For a list of numbers that holds something else.
    """
    hints, given = get_type_hints(plan), dict(more)
    for f in fields(plan):  # pyright: ignore[reportArgumentType]
        if f.name in more:
            continue
        if is_dataclass(hints[f.name]):
            given[f.name] = from_options(hints[f.name], options)  # pyright: ignore[reportArgumentType]
        elif f.name in options:
            given[f.name] = _value(f.name, hints[f.name], options[f.name])
    return plan(**given)


def _leaves(plan: type) -> Iterator[tuple[Field[Any], Any, str]]:
    """(field, type, help) of a plan and of the dataclasses inside of it."""
    from interp.analyses.docstrings import argument_lines

    hints, helps = get_type_hints(plan), argument_lines(plan)
    for f in fields(plan):  # pyright: ignore[reportArgumentType]
        if is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name])  # pyright: ignore[reportArgumentType]
        else:
            yield f, hints[f.name], helps.get(f.name, "")


def _parameter(f: Field[Any], hint: Any, text: str) -> inspect.Parameter:
    """The parameter of a command that stands for a field; lists are texts with commas."""
    default: Any = inspect.Parameter.empty
    if f.default is not MISSING:
        default = f.default
    elif f.default_factory is not MISSING:
        default = f.default_factory()
    if get_origin(hint) is tuple:
        hint, default = str, ",".join(map(str, default))
    annotation = Annotated[hint, typer.Option(help=text)]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(name: str, hint: Any, given: Any) -> Any:
    if get_origin(hint) is not tuple or not isinstance(given, str):
        return given
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if get_args(hint)[0] is str:
        return tuple(parts)
    try:
        return tuple(get_args(hint)[0](part) for part in parts)
    except ValueError:
        option = name.replace("_", "-")
        raise UsageError(
            f"--{option} {shortened(given)!r} is not a list of numbers; give numbers separated by commas."
        ) from None
