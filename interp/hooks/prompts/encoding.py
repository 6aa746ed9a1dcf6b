"""Encoding of one prompt: the item that a user gives, its rendered text, and its tokens."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.errors import PromptError
from interp.hooks.limits import parse_json, refusing
from interp.hooks.model.bos import n_added_after
from interp.hooks.model.chat_template import render


def normalize_item(item: Any, number: int) -> dict[str, Any]:
    """Normalise an item of `encode` to a dict with "text" or "messages", "spans" and "meta"."""
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, Sequence):
        item = {"messages": item}
    if not isinstance(item, Mapping) or ("text" in item) == ("messages" in item):
        raise PromptError(
            f'prompt {number} is neither a text nor a chat; give a string, a list of messages, {{"text": ...}} or '
            '{"messages": ...}.'
        )
    if unknown := set(item) - {"text", "messages", "spans", "meta"}:
        raise PromptError(f'prompt {number} has unknown entries {sorted(map(str, unknown))}; put them into "meta".')
    row = {key: value for key, value in item.items() if value is not None}
    for key in ("spans", "meta"):
        if not isinstance(row.get(key, {}), Mapping):
            raise PromptError(f'"{key}" of prompt {number} is {row[key]!r}; give a dict with names as keys.')
    if "messages" in row:
        _check_messages(row["messages"], number)
    elif not isinstance(row.get("text"), str) or not row["text"]:
        raise PromptError(f"prompt {number} is empty; give a text of at least one character.")
    return row


def _check_messages(messages: Any, number: int) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise PromptError(f"prompt {number} holds no messages; give a list of at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PromptError(
                f'prompt {number} holds {message!r}, which is not a message; give {{"role": ..., "content": ...}}.'
            )


def render_text(
    tokenizer: Any,
    row: Mapping[str, Any],
    number: int,
    chat: bool | None,
    continue_final: bool,
    add_generation_prompt: bool | None,
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[str, bool]:
    """Return the text to encode, and whether a chat template rendered it."""
    if "text" in row and not chat:
        return row["text"], False
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["text"]}]
    if chat is False:
        raise PromptError(f"prompt {number} is a chat, but chat=False; give it as a text, or leave chat=None.")
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"prompt {number} is a chat, but the tokenizer has no chat template; give it as a text.")
    answered = messages[-1]["role"] == "assistant"
    go_on = continue_final and answered
    generation = not answered if add_generation_prompt is None else add_generation_prompt
    settings = {"add_generation_prompt": generation and not go_on, "continue_final_message": go_on}
    text = render(tokenizer, messages, f"prompt {number}", **settings, **(template_kwargs or {}))
    end = getattr(tokenizer, "eos_token", None)
    if end and add_generation_prompt is None and not answered and text.rstrip().endswith(end):
        warnings.warn(
            f"the chat template ends prompt {number} with {end!r} and begins no reply, so that the model may end it at "
            "once; give the prompt as a text, or a template that has add_generation_prompt.",
            stacklevel=3,
        )
    return text, True


def tokenize(tokenizer: Any, text: str, number: int, special: bool, keep_end: bool) -> Mapping[str, Any]:
    """Encode a text with character offsets; `special` adds the special tokens of the tokenizer.

    Those that it adds after the text are left out, with a warning, unless `keep_end` keeps them.
    """
    with refusing(f"the tokenizer cannot encode prompt {number}", PromptError, "change the text, or load it again"):
        encoded = tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
    ids = encoded["input_ids"]
    if not ids:
        raise PromptError(f"prompt {number} has no tokens; give a text that the tokenizer keeps.")
    bos = getattr(tokenizer, "bos_token_id", None)
    if encoded["special_tokens_mask"][0] and bos is not None and ids[:2] == [bos, bos]:
        raise PromptError(
            f'prompt {number} begins with "{tokenizer.bos_token}", which the tokenizer adds as well; leave it out.'
        )
    added = 0 if keep_end else n_added_after(encoded["special_tokens_mask"])
    if not added:
        return encoded
    last = "".join(tokenizer.convert_ids_to_tokens(ids[-added:]))
    warnings.warn(
        f"the tokenizer adds {last!r} after each text, which interp leaves out, since a model does not continue a text "
        "that has ended; keep_end=True keeps it.",
        stacklevel=3,
    )
    return {name: encoded[name][:-added] for name in ("input_ids", "offset_mapping", "special_tokens_mask")}


def padding_id(tokenizer: Any) -> int:
    """Return the id of the padding token, else of the end token, else 0."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if token is not None), 0)


def parse_json_line(line: str, path: Path, number: int) -> Any:
    """Parse one line of a .jsonl file as an object."""
    try:
        item = parse_json(line)
    except ValueError as error:
        raise PromptError(f"line {number} of {path} is not JSON ({error}); write one object on each line.") from error
    if not isinstance(item, Mapping):
        raise PromptError(f'line {number} of {path} is not an object; write {{"text": ...}} or {{"messages": [...]}}.')
    return item
