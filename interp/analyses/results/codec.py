"""One file format for all results: JSON for the fields of a dataclass, safetensors next to it for its tensors."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from interp.analyses.results.files import SEAL, is_sealed, read_text, seal
from interp.errors import InterpError, ScoreError
from interp.hooks.limits import check_regular, parse_json, refusing
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.portable import portable
from interp.hooks.model.provenance import Provenance
from interp.hooks.writer import check_writable, reason, write_atomic

FORMAT = "interp.result/2"
STEP = "$file"
"""entry of a step of a computation: the name of its file"""
T = TypeVar("T")
_TYPES: dict[str, type] = {"HeadLayout": HeadLayout}
_MAPPINGS = (dict, Mapping)
_MARKED = re.compile(r"^@result\b.*?^class (\w+)", re.M | re.S)


def result(cls: type[T]) -> type[T]:
    """Mark a dataclass as one that files may hold, under its class name.

    Put it above `@dataclass`. Fields may be numbers, texts, None, tensors, Head, HeadSet, Provenance, other marked
    dataclasses, and tuples, lists and dicts of these. A file makes marked dataclasses and nothing else: it cannot name
    a module or another class.

    Args:
        cls: The dataclass.

    Raises:
        ScoreError: If another class of that name is marked.
    """
    other = _TYPES.get(cls.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ScoreError(f"two results are named {cls.__name__!r} ({other.__module__}, {cls.__module__}); rename one.")
    _TYPES[cls.__name__] = cls
    return cls


def save(value: Any, path: str | Path, *, in_run: bool = False, is_step: bool = False) -> Path:
    """Write a marked dataclass, its tensors to a second file next to the first.

    Args:
        value: The dataclass.
        path: A file name; ".json" is added where it is missing.
        in_run: Whether a run writes a file inside its folder.
        is_step: Whether the file is a step of a computation, whose name says what it holds; a renamed one is refused.

    Returns:
        Path: The JSON file.

    Raises:
        ScoreError: If a field cannot be stored, or the files cannot be written.
    """
    from safetensors.torch import save as serialise

    path = json_path(path)
    check_writable(path, in_run=in_run)
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, **_encode(value, type(value).__name__, "", tensors)}
    content |= {STEP: path.name} if is_step else {}
    if tensors:
        data = serialise({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        # tensors first: a kill in between leaves a pair whose hashes differ, which load refuses
        write_atomic(path.with_suffix(".safetensors"), data, in_run=in_run)
        content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    return write_atomic(path, (json.dumps(seal(content), indent=1, allow_nan=False) + "\n").encode(), in_run=in_run)


def load(path: str | Path) -> Any:
    """Read what `save` wrote.

    Args:
        path: The JSON file; ".json" is added where it is missing.

    Returns:
        The dataclass, bit for bit as it was saved.

    Raises:
        ScoreError: If the file holds no result, is of another version, is broken or was changed, or its tensors are
            missing or belong to another file.
    """
    path = json_path(path)
    content = _content(path)
    if "$type" not in content:
        raise ScoreError(f"{path} names no type of result; give a file that a result's save() wrote.")
    tensors = _tensors(path, content)
    with refusing(f"{path} is broken", ScoreError, "make it again"):
        try:
            return _made(content, tensors)
        except InterpError as error:
            raise ScoreError(f"{path} is broken: {error}") from error


def checksum(path: Path) -> str:
    """The checksum of a file that `save` wrote and of its tensors, which is compared with them.

    Args:
        path: The JSON file.

    Returns:
        The checksum of the JSON file, which holds that of its tensors.

    Raises:
        ScoreError: If a file is missing or broken, or was changed.
    """
    content = _content(path)
    _tensor_bytes(path, content)
    if SEAL not in content:
        raise ScoreError(f"{path} has no checksum; make it again.")
    return content[SEAL]


def _content(path: Path) -> dict[str, Any]:
    """The JSON object of a result, whose format and checksum are right; other programs may leave the checksum out."""
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ScoreError(
            f"{path} has the format {content.get('format')!r}, expected {FORMAT!r}; make the result again with this "
            "version, or give a file that it wrote."
        )
    try:
        same = SEAL not in content or is_sealed(content)
    except RecursionError as error:
        raise ScoreError(f"{path} is broken (it is nested too deeply); make it again.") from error
    if content.get(STEP, path.name) != path.name:
        raise ScoreError(f"{path} was renamed, and is a step of a computation; delete it and run again.")
    if not same:
        raise ScoreError(f"{path} was changed or damaged after it was written (its checksum differs); make it again.")
    return content


def json_path(path: str | Path) -> Path:
    """The path with ".json" added where it is missing."""
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(path.name + ".json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ScoreError."""
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        if isinstance(error, ScoreError):
            raise
        raise ScoreError(f"{path} is not JSON ({error}); the file is broken, make it again.") from error
    if not isinstance(content, dict):
        raise ScoreError(f"{path} holds a {type(content).__name__}, expected an object; give a file of a result.")
    return content


def _tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    if (data := _tensor_bytes(path, content)) is None:
        return {}
    try:
        return deserialise(data)
    except SafetensorError as error:
        raise ScoreError(
            f"{path.with_suffix('.safetensors')} is not a safetensors file ({error}); make it again."
        ) from error


def _tensor_bytes(path: Path, content: Mapping[str, Any]) -> bytes | None:
    """The file of the tensors, whose hash is right; None where there are none."""
    if "tensors_sha256" not in content:
        return None
    companion = path.with_suffix(".safetensors")
    try:
        # a missing file is named together with the file that needs it
        if companion.exists():
            check_regular(companion, ScoreError, None)
        data = companion.read_bytes()
    except OSError as error:
        raise ScoreError(
            f"{path} needs {companion.name} next to it, which cannot be read ({reason(error)})."
        ) from error
    if hashlib.sha256(data).hexdigest() != content["tensors_sha256"]:
        raise ScoreError(f"{companion} does not belong to {path.name}; keep the two files of one save together.")
    return data


def _encode(value: Any, what: str, key: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON of a value; tensors are collected under the path that leads to them."""
    if isinstance(value, Tensor):
        # a tensor that two results share is written twice, as safetensors wants it
        while key in tensors:
            # keys of a dict may hold dots
            key += "'"
        tensors[key] = value.clone()
        return {"$tensor": key}
    if isinstance(value, Head | HeadSet):
        return str(value) if isinstance(value, Head) or len(value) else ""
    if isinstance(value, Provenance):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if _TYPES.get(name) is not type(value):
            raise ScoreError(f"{what} holds a {name}, which is not a result; mark its class with codec.result.")
        inner = f"{key}." if key else ""
        stored = {
            f.name: _encode(_leaving(f.name, getattr(value, f.name)), f"{name}.{f.name}", inner + f.name, tensors)
            for f in fields(value)
            if f.init
        }
        return {"$type": name, **stored}
    if isinstance(value, Mapping):
        if wrong := [name for name in value if not isinstance(name, str) or name.startswith("$")]:
            raise ScoreError(f"{what} has the key {wrong[0]!r}; give texts as keys, none of which begins with '$'.")
        return {name: _encode(each, f"{what}[{name!r}]", f"{key}.{name}", tensors) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(each, f"{what}[{i}]", f"{key}.{i}", tensors) for i, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ScoreError(f"{what} is a {type(value).__name__}, which cannot be stored; use numbers, texts or tensors.")


def _leaving(field: str, value: Any) -> Any:
    """The value of a field as it may leave the machine: settings name files without the way to them."""
    return portable(value) if field == "settings" and isinstance(value, Mapping) else value


def _decode(content: Any, hint: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value behind what JSON holds; the annotation of a field tells tuples from lists and names from head sets."""
    _check_kind(content, hint)
    options = _options(hint)
    if isinstance(content, dict):
        if "$tensor" in content:
            name = content["$tensor"]
            if not isinstance(name, str) or name not in tensors:
                raise ScoreError(f"it has no tensor {name!r}; keep the two files of one save together.")
            return tensors[name]
        if "$float" in content:
            return float(content["$float"])
        if "$type" in content:
            return _made(content, tensors)
        if Provenance in options:
            return Provenance.from_dict(content)
        inner = next((get_args(o)[1] for o in options if get_origin(o) in _MAPPINGS and get_args(o)), Any)
        return {name: _decode(each, inner, tensors) for name, each in content.items()}
    if isinstance(content, list):
        for option in options:
            if option is tuple:
                return tuple(_decode(each, Any, tensors) for each in content)
            if get_origin(option) is tuple:
                inner = get_args(option)
                if inner[-1:] != (...,) and len(inner) != len(content):
                    raise _WrongType(f"expected {len(inner)} entries")
                of = [inner[0]] * len(content) if inner[-1:] == (...,) else list(inner)
                return tuple(_decode(each, kind, tensors) for each, kind in zip(content, of, strict=True))
        inner = next((get_args(o)[0] for o in options if get_origin(o) in (list, Sequence) and get_args(o)), Any)
        return [_decode(each, inner, tensors) for each in content]
    if isinstance(content, str) and HeadSet in options:
        return HeadSet.parse(content) if content else HeadSet(())
    if isinstance(content, str) and Head in options:
        return Head.parse(content)
    return content


def _made(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The dataclass that an object with "$type" holds."""
    name = content["$type"]
    kind = find_type(name) if isinstance(name, str) else None
    if kind is None:
        raise ScoreError(f"it holds a {name!r}, which is unknown here; install the package that defines it.")
    hints, given = _hints(kind), {}
    for f in fields(kind):  # pyright: ignore[reportArgumentType]
        if not f.init:
            continue
        if f.name in content:
            try:
                given[f.name] = _decode(content[f.name], hints.get(f.name, Any), tensors)
            except _WrongType as error:
                shown = repr(content[f.name])
                shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
                raise ScoreError(f'it has no usable "{f.name}" ({shown}, {error}); make it again.') from None
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ScoreError(f'it has no "{f.name}"; make it again.')
    return kind(**given)


class _WrongType(TypeError):
    """A value of another type than its field's."""


def _check_kind(content: Any, hint: Any) -> None:
    """Raise for a value whose kind no alternative of the annotation has."""
    allowed: set[str] = set()
    for option in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kinds = _kinds(option)
        if kinds is None:
            return
        allowed |= kinds
    if not _kind(content) & allowed:
        raise _WrongType(f"expected {' or '.join(sorted(allowed))}")


def _kind(content: Any) -> set[str]:
    """Names of the kinds that a value of JSON has: an int is a float as well."""
    if isinstance(content, dict):
        if "$type" in content:
            return {str(content["$type"])}
        return {"tensor" if "$tensor" in content else "float" if "$float" in content else "object"}
    return {"int", "float"} if type(content) is int else {type(content).__name__}


def _kinds(option: Any) -> set[str] | None:
    """Names of the kinds that an alternative of an annotation accepts; None where it accepts any."""
    if option is None or option is NoneType:
        return {"NoneType"}
    if option in (bool, int, float, str):
        return {option.__name__}
    if option in (Head, HeadSet):
        return {"str"}
    origin = get_origin(option) or option
    if origin is Literal:
        return {type(value).__name__ for value in get_args(option)}
    if origin in (tuple, list, Sequence):
        return {"list"}
    if origin in _MAPPINGS or origin is Provenance:
        return {"object"}
    # jaxtyping's Float32[Tensor, "n l h"]
    if origin is Tensor or getattr(origin, "array_type", None) is Tensor:
        return {"tensor"}
    if isinstance(origin, type) and _TYPES.get(origin.__name__) is origin:
        return {origin.__name__}
    return None


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
            # a package that cannot be imported defines nothing
            with contextlib.suppress(ImportError, AttributeError):
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
