"""Both ends of a prompt: what a tokenizer's own call and its chat template add, and a copy that differs in BOS.

All built-in prompts follow the tokenizer. Texts begin as its own call begins them, chats as its chat template does.
What its own call adds after a text, such as EOS, is left out, since a model does not continue a text that has ended.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

from interp.errors import PromptError
from interp.hooks.model.chat_template import render

CHANGED = "interp_bos"
"""attribute of a tokenizer that `with_bos` made"""
_WITHOUT = "{% set bos_token = '' %}"
_WITH = "{{ bos_token }}"


def first_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the special tokens, such as BOS, that the tokenizer's own call puts before a text; often there are none.

    Args:
        tokenizer: The tokenizer of the model.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    return tuple(ids[: next((place for place, mark in enumerate(special) if not mark), 0)])


def last_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the special tokens, such as EOS, that the tokenizer's own call puts after a text; often there are none.

    Args:
        tokenizer: The tokenizer of the model.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    return tuple(ids[len(ids) - n_added_after(encoded["special_tokens_mask"]) :])


def n_added_after(special_tokens_mask: Sequence[int]) -> int:
    """Count the special tokens that a tokenizer has added after a text; none where it holds nothing else."""
    return next((count for count, added in enumerate(reversed(special_tokens_mask)) if not added), 0)


def begins_chat(tokenizer: Any) -> bool | None:
    """Whether a chat begins with the BOS token; None where the tokenizer has no BOS token or no usable chat template.

    Args:
        tokenizer: The tokenizer of the model.
    """
    bos = getattr(tokenizer, "bos_token", None)
    if not bos or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return render(tokenizer, [{"role": "user", "content": "a"}]).startswith(bos)
    except PromptError:
        return None


def bos_rule(tokenizer: Any) -> str:
    """The special tokens at both ends of texts and chats, as "texts: <s>; chats: <s>"; "" without a tokenizer.

    Args:
        tokenizer: The tokenizer of the prompts.
    """
    if tokenizer is None or not callable(tokenizer):
        return ""
    first = "".join(tokenizer.convert_ids_to_tokens(list(first_tokens(tokenizer))))
    chat = begins_chat(tokenizer)
    last = "".join(tokenizer.convert_ids_to_tokens(list(last_tokens(tokenizer))))
    parts = [f"texts: {first or 'none added'}"]
    parts += [f"left out after texts: {last}"] if last else []
    parts += [] if chat is None else [f"chats: {tokenizer.bos_token if chat else 'none added'}"]
    changed = getattr(tokenizer, CHANGED, None)
    rule = "default of the tokenizer" if changed is None else f"set by bos={changed}"
    return f"{'; '.join(parts)} ({rule})"


def with_bos(tokenizer: Any, bos: bool) -> Any:
    """Copy a tokenizer so that its own call and its chat template put BOS before each prompt, or leave it out.

    All built-in prompts, and texts that a user encodes with the copy, follow it.

    Args:
        tokenizer: A fast tokenizer.
        bos: Whether prompts begin with BOS.

    Returns:
        The copy, with another hash.

    Raises:
        PromptError: If the tokenizer has no BOS token, is not fast, or does not let its first token be changed.

    Limits:
        A token that a chat template writes as text, as "<|im_start|>" of ChatML, is part of the chat and remains.
    """
    token, backend = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "backend_tokenizer", None)
    if not token or backend is None or not hasattr(backend, "to_str"):
        reason = "has no BOS token" if not token else "is not fast"
        raise PromptError(f"bos={bos} was given, but the tokenizer {reason}; leave bos=None for its own rule.")
    changed = copy.deepcopy(tokenizer)
    if (first_tokens(changed)[:1] == (changed.bos_token_id,)) is not bos:
        stored = json.loads(backend.to_str())
        stored["post_processor"] = (_added if bos else _removed)(stored["post_processor"], token, changed.bos_token_id)
        changed._tokenizer = type(backend).from_str(json.dumps(stored))
    template = getattr(changed, "chat_template", None)
    if isinstance(template, str) and begins_chat(changed) is (not bos):
        changed.chat_template = (_WITH if bos else _WITHOUT) + template
    setattr(changed, CHANGED, bos)
    if (first_tokens(changed)[:1] == (changed.bos_token_id,)) is not bos:
        raise PromptError(
            f"bos={bos} was given, but the tokenizer {'does not add' if bos else 'still adds'} {token!r}, since its "
            "post-processor is of another form; leave bos=None for its own rule."
        )
    return changed


def _added(processor: Any, token: str, number: int) -> dict[str, Any]:
    """A stored post-processor, followed by one that puts the token first."""
    special = {"id": token, "ids": [number], "tokens": [token]}
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, other],
        "special_tokens": {token: special},
    }
    if processor is None:
        return template
    before = processor["processors"] if processor["type"] == "Sequence" else [processor]
    return {"type": "Sequence", "processors": [*before, template]}


def _removed(processor: Any, token: str, number: int) -> Any:
    """A stored post-processor without the token in its templates."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_removed(each, token, number) for each in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return processor
    marks = {name for name, each in processor["special_tokens"].items() if each["ids"] == [number]}
    sides = {
        side: [part for part in processor[side] if part.get("SpecialToken", {}).get("id") not in marks]
        for side in ("single", "pair")
    }
    return {**processor, **sides}
