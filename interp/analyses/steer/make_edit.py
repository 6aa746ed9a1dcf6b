"""Edits from their names and plain settings, as the command line and files give them."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import product
from typing import Any

from torch import nn

from interp.analyses import registry
from interp.analyses.registry import EditEntry
from interp.analyses.steer.describe import describe
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit
from interp.hooks.model.heads import HeadSet
from interp.hooks.prompts.prompts import Prompts


def make_edit(
    name: str,
    settings: Mapping[str, Any],
    span: Any = "mark",
    heads: str | HeadSet = "all",
    model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Edit:
    """Make a declared edit from plain settings.

    - An edit that marks spans marks `span`, or `settings["spans"]` where it is given: a name, or a list of names and
      [start, stop] ranges.
    - A setting that the edit declares as tuned, such as the gamma of ZeroTuning, may be missing: the edit then has the
      default of its class, which changes nothing. `tuned_edits` gives the candidates.
    - A field without a default, such as the vectors of Offset, is a setting, in numbers or as the path of a
      .safetensors file. Without it, the edit is estimated from `prompts` by the function that its declaration names:
      Offset by `iti`, whose settings k, alpha, direction and folds can be given too; FoundInTheMiddle by `slot_bias`,
      with the setting dummy.

    Args:
        name: Name of the edit, such as "pasta"; capitals and hyphens are allowed. See `registry.names("edit")`.
        settings: Field -> value, as JSON gives it.
        span: The span of the task that is marked.
        heads: Heads to edit, as HeadSet.parse takes them.
        model: The model, for an edit that is estimated.
        prompts: Prompts of the profile split, for an edit that is estimated. Offset needs `meta["right"]` and
            `meta["wrong"]`, FoundInTheMiddle a tokenizer.

    Returns:
        Edit: the edit. `edit.gate is None` says that it edits attention, so that `profile` can score its heads.
        Edits of head outputs (Gate, Offset) cannot be profiled; name their heads, or use all of them.

    Raises:
        UsageError: For an unknown name or setting, a value of the wrong type or out of range, an edit that changes
            nothing, or an edit that has to be estimated where model or prompts are missing.

    Examples:
        >>> interp.steer.make_edit("boost", {"factor": 2.0}, span="first", heads="L0")
        Boost(heads='L0', spans=('first',), factor=2.0, protect_first=False)
    """
    entry: EditEntry = registry.get(name, "edit")
    entry.check_settings(settings)
    known = {f.name: f for f in fields(entry.thing)}
    given = {key: _from_json(value) for key, value in settings.items()}
    where = str(heads) if isinstance(heads, HeadSet) else heads
    marked = given.pop("spans", span)
    missing = [
        key for key, f in known.items() if f.init and f.default is MISSING and f.default_factory is MISSING
        and key not in ("spans", *given)
    ]  # fmt: skip
    try:
        if missing and entry.fitted is not None:
            if model is None or prompts is None:
                raise UsageError(
                    f"{entry.name} has no {missing[0]}; give {entry.name}.{missing[0]}, such as the path of a "
                    ".safetensors file, or a model and prompts to estimate it from."
                )
            made = entry.fitted(model, prompts, span=marked, heads=where, **given)
        elif missing:
            raise UsageError(f"{entry.name} has no {missing[0]}; give {entry.name}.{missing[0]}.")
        else:
            _refuse_fit_settings(entry, given, set(known))
            own = {"spans": marked} if "spans" in known else {}
            made = entry.thing(**own, **given, heads=where)
    except (TypeError, AttributeError) as error:
        raise UsageError(f"a setting of {entry.name} has the wrong type ({error}); see its documentation.") from error
    if made.is_noop and not set(entry.tuned) - set(given):
        options = ", ".join(f"{entry.name}.{key}" for key in entry.settings if key != "spans")
        raise UsageError(f"{describe(made)} changes nothing; give another value of {options or 'its spans'}.")
    return made


def tuned_edits(
    name: str, settings: Mapping[str, Any], span: Any = "mark", heads: str | HeadSet = "all"
) -> dict[str, Edit]:
    """Candidates for the settings that an edit declares as tuned and that are not given.

    Args:
        name: As in `make_edit`.
        settings: As in `make_edit`.
        span: As in `make_edit`.
        heads: As in `make_edit`.

    Returns:
        Candidate -> edit, such as "gamma=0.2"; empty where nothing is left to choose. `choose` compares them.

    Raises:
        UsageError: As `make_edit`.

    Examples:
        >>> list(interp.steer.tuned_edits("zerotuning", {}))
        ['gamma=0.2', 'gamma=0.5', 'gamma=2.0', 'gamma=5.0']
        >>> interp.steer.tuned_edits("zerotuning", {"gamma": 3.0})
        {}
    """
    entry: EditEntry = registry.get(name, "edit")
    entry.check_settings(settings)
    free = {key: values for key, values in entry.tuned.items() if key not in settings}
    if not free:
        return {}
    rows = [dict(zip(free, values, strict=True)) for values in product(*free.values())]
    return {
        ", ".join(f"{key}={value}" for key, value in row.items()): make_edit(name, {**settings, **row}, span, heads)
        for row in rows
    }


def _refuse_fit_settings(entry: EditEntry, given: Mapping[str, Any], known: set[str]) -> None:
    """Raise UsageError for a setting of the estimation where nothing is estimated."""
    if other := [key for key in given if key not in known]:
        raise UsageError(f"{entry.name}.{other[0]} is a setting of its estimation, but nothing is left to estimate; "
                         "leave it out.")  # fmt: skip


def _from_json(value: Any) -> Any:
    """A list in a list becomes a tuple, so that [[2, 5], 9] is a range and a position."""
    return [tuple(part) if isinstance(part, list) else part for part in value] if isinstance(value, list) else value
