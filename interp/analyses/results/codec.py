"""One file format for all results: JSON for the fields of a dataclass, safetensors next to it for its tensors."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from interp.analyses.results.files import read_text, reason, write_atomic
from interp.errors import InterpError, ScoreError
from interp.hooks.model.heads import Head, HeadSet
from interp.hooks.model.provenance import Provenance

FORMAT = "interp.result/2"
T = TypeVar("T")
_TYPES: dict[str, type] = {}
_MARKED = re.compile(r"^@result\b.*?^class (\w+)", re.M | re.S)


def result(cls: type[T]) -> type[T]:
    """Mark a dataclass as one that files may hold, under its class name.

    Put it above `@dataclass`. Fields may be numbers, texts, None, tensors, Head, HeadSet, Provenance, other marked
    dataclasses, and tuples, lists and dicts of these.
    """
    other = _TYPES.get(cls.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ScoreError(f"two results are named {cls.__name__!r} ({other.__module__}, {cls.__module__}); rename one.")
    _TYPES[cls.__name__] = cls
    return cls


def save(value: Any, path: str | Path) -> Path:
    """Write a marked dataclass; returns the path of the JSON file.

    Raises:
        ScoreError: Where a field cannot be stored, or the files cannot be written.
    """
    from safetensors.torch import save as serialise

    path = json_path(path)
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, **_encode(value, type(value).__name__, "", tensors)}
    if tensors:
        data = serialise({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        # tensors first: a kill in between leaves a pair whose hashes differ, which load refuses
        write_atomic(path.with_suffix(".safetensors"), data)
        content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def load(path: str | Path) -> Any:
    """Read what `save` wrote.

    Raises:
        ScoreError: For a file that is not one, is of another version, or whose tensors are missing or another file's.
    """
    path = json_path(path)
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ScoreError(
            f"{path} has the format {content.get('format')!r}, expected {FORMAT!r}; make the result again with this "
            "version, or give a file that it wrote."
        )
    try:
        return _decode(content, Any, _tensors(path, content))
    except ScoreError as error:
        raise ScoreError(f"{path} is broken: {error}") from error
    except (InterpError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScoreError(f"{path} is broken ({error}); make it again.") from error


def json_path(path: str | Path) -> Path:
    """The path with ".json" added where it is missing."""
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(path.name + ".json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ScoreError."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ScoreError):
            raise
        raise ScoreError(f"{path} is not JSON ({error}); the file is broken, make it again.") from error
    if not isinstance(content, dict):
        raise ScoreError(f"{path} holds a {type(content).__name__}, expected an object; give a file of a result.")
    return content


def _tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    if "tensors_sha256" not in content:
        return {}
    companion = path.with_suffix(".safetensors")
    try:
        data = companion.read_bytes()
    except OSError as error:
        raise ScoreError(
            f"{path} needs {companion.name} next to it, which cannot be read ({reason(error)})."
        ) from error
    if hashlib.sha256(data).hexdigest() != content["tensors_sha256"]:
        raise ScoreError(f"{companion} does not belong to {path.name}; keep the two files of one save together.")
    try:
        return deserialise(data)
    except SafetensorError as error:
        raise ScoreError(f"{companion} is not a safetensors file ({error}); make it again.") from error


def _encode(value: Any, what: str, key: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON holds for a value; tensors are put aside under the path that leads to them."""
    if isinstance(value, Tensor):
        # a tensor that two results share is written twice, as safetensors wants it
        tensors[key] = value.clone()
        return {"$tensor": key}
    if isinstance(value, Head | HeadSet):
        return str(value) if isinstance(value, Head) or len(value) else ""
    if isinstance(value, Provenance):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if _TYPES.get(name) is not type(value):
            raise ScoreError(f"{what} holds a {name}, which is no result; mark it with codec.result.")
        inner = f"{key}." if key else ""
        stored = {
            f.name: _encode(getattr(value, f.name), f"{name}.{f.name}", inner + f.name, tensors)
            for f in fields(value)
            if f.init
        }
        return {"$type": name, **stored}
    if isinstance(value, Mapping):
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise ScoreError(f"{what} has the key {wrong[0]!r}; give texts as keys.")
        return {name: _encode(each, f"{what}[{name!r}]", f"{key}.{name}", tensors) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(each, f"{what}[{i}]", f"{key}.{i}", tensors) for i, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ScoreError(f"{what} is a {type(value).__name__}, which cannot be stored; use numbers, texts or tensors.")


def _decode(content: Any, hint: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value behind what JSON holds; the annotation of a field tells tuples from lists and names from head sets."""
    if isinstance(content, dict):
        if "$tensor" in content:
            return tensors[content["$tensor"]]
        if "$float" in content:
            return float(content["$float"])
        if "$type" in content:
            return _made(content, tensors)
        if Provenance in _options(hint):
            return Provenance.from_dict(content)
        inner = next((get_args(option)[1] for option in _options(hint) if get_origin(option) in (dict, Mapping)), Any)
        return {name: _decode(each, inner, tensors) for name, each in content.items()}
    if isinstance(content, list):
        for option in _options(hint):
            if get_origin(option) is tuple:
                inner = get_args(option)
                of = [inner[0]] * len(content) if inner[-1:] == (...,) else list(inner)
                return tuple(_decode(each, kind, tensors) for each, kind in zip(content, of, strict=True))
        inner = next((get_args(option)[0] for option in _options(hint) if get_origin(option) is list), Any)
        return [_decode(each, inner, tensors) for each in content]
    _check_plain(content, hint)
    if isinstance(content, str) and HeadSet in _options(hint):
        return HeadSet.parse(content) if content else HeadSet(())
    if isinstance(content, str) and Head in _options(hint):
        return Head.parse(content)
    return content


def _made(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The dataclass that an object with "$type" holds."""
    kind = find_type(str(content["$type"]))
    if kind is None:
        raise ScoreError(
            f"it holds a {content['$type']!r}, which is unknown here; install the package that defines it."
        )
    hints, given = _hints(kind), {}
    for f in fields(kind):  # pyright: ignore[reportArgumentType]
        if f.init and f.name in content:
            try:
                given[f.name] = _decode(content[f.name], hints.get(f.name, Any), tensors)
            except _WrongType as error:
                raise ScoreError(f'it has no usable "{f.name}" ({content[f.name]!r}, {error}).') from None
    return kind(**given)


class _WrongType(TypeError):
    """A number or text of another type than its field's."""


def _check_plain(content: Any, hint: Any) -> None:
    """Raise for a number, text or None where the annotation names other plain types."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = {bool, int, float, str, NoneType, Head, HeadSet}
    if not all(option in plain or option is None for option in options):
        return
    if content is None:
        fits = NoneType in options or None in options
    elif isinstance(content, str):
        fits = bool({str, Head, HeadSet} & set(options))
    else:
        fits = type(content) in options or (type(content) is int and float in options)
    if not fits:
        raise _WrongType(f"expected {' or '.join(getattr(option, '__name__', 'None') for option in options)}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation, None left out."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(option for option in get_args(hint) if option is not NoneType)
    return (hint,)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def find_type(name: str) -> type | None:
    """The marked dataclass of a name; the module of a built-in one is imported where it has to be."""
    if name not in _TYPES and name in _modules():
        import_module(_modules()[name])
    if name not in _TYPES:
        for load_package in _packages():
            load_package()
    return _TYPES.get(name)


@cache
def _modules() -> dict[str, str]:
    """Class name -> module of the built-in results, found in the text of the files."""
    root = Path(__file__).parents[1]
    found = {}
    for path in sorted(root.rglob("*.py")):
        module = ".".join(("interp.analyses", *path.relative_to(root).with_suffix("").parts))
        found |= {match[1]: module for match in _MARKED.finditer(path.read_text(encoding="utf-8"))}
    return found


def _packages() -> list[Callable[[], Any]]:
    """Loaders of the analyses of other packages, whose modules may define results."""
    from importlib import metadata

    return [point.load for point in metadata.entry_points(group="interp.analyses")]
