"""The date in chat templates: fixed when a run begins, and kept in its folder."""

from datetime import date
from pathlib import Path
from typing import Any

from interp.errors import RunError
from interp.hooks.model.chat_template import fixed_date, uses_date, with_date
from interp.runs import folder as folders


def dated(folder: str | Path, tokenizer: Any) -> Any:
    """The tokenizer whose chats have the date of the run in a folder, or the current date for a new run.

    Some chat templates write the current date into each chat. Without a fixed one, prompts would differ from day to
    day, and a run that was begun before midnight could not be continued after it.

    Args:
        folder: The folder of the run; it need not exist.
        tokenizer: The tokenizer.

    Returns:
        A copy of the tokenizer with a fixed date; the tokenizer itself if its template does not use the date, or if
        `with_date` fixed it before.

    Raises:
        RunError: If the folder holds a run with another format, or a damaged one.
    """
    if fixed_date(tokenizer) or not uses_date(tokenizer):
        return tokenizer
    path = Path(folder)
    stored = folders.read_manifest(path).get("date") if folders.is_run(path) else ""
    if stored and not isinstance(stored, str):
        raise RunError(f"{path} holds a run whose date is {stored!r}; make the run again in another folder.")
    return with_date(tokenizer, stored or _today())


def _today() -> str:
    return date.today().isoformat()
