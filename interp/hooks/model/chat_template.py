"""Chat templates, which are programs from a model folder: rendered within limits, and with a date that can be fixed."""

import copy
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from types import FrameType
from typing import Any

from interp.errors import PromptError

SECONDS = 5.0
"""time for one chat"""
MAX_TEMPLATE = 1_000_000
"""characters of a template"""
MAX_VALUE = 20_000_000
"""characters of a text that a template makes, and elements of its lists"""
MAX_WIDTH = 1000
"""width to which a template may pad a text, and times that it may repeat one"""
MAX_JOINS = 200
"""texts that one expression may join"""
DATE = "interp_date"
"""attribute of a tokenizer that `with_date` made"""
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_WIDE = re.compile(r"\d{4,}|\*")
_PADDING = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "indent",
    "wordwrap",
    "batch",
    "slice",
    "format",
    "lipsum",
)


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], what: str = "a chat", **options: Any) -> str:
    """Render a chat by the template of a tokenizer, within limits of time and size.

    Args:
        tokenizer: The tokenizer.
        messages: The chat.
        what: The chat in an error, such as "prompt 3".
        **options: Further arguments of `apply_chat_template`.

    Returns:
        The text of the chat.

    Raises:
        PromptError: If the template refuses the chat, fails, could take any time or memory, takes longer than 5
            seconds, or makes a text of more than 20 million characters.

    Examples:
        >>> from interp.hooks.model.chat_template import render
        >>> render(tokenizer, [{"role": "user", "content": "Hi"}])
        '<s>user:Hi</s>'
    """
    try:
        check_template(tokenizer.get_chat_template(options.get("chat_template"), options.get("tools")))
        with _limited():
            return tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    # a template can fail with any error of Python
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PromptError(
            f"the chat template refuses {what} ({reason}); change the messages, or give the prompt as a text."
        ) from error


@lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Refuse a template with an operation whose result can have any size, before it is compiled.

    Args:
        template: The template.

    Raises:
        ValueError: For a power, a product or a padding of unknown size, and for a random choice.
    """
    from jinja2 import nodes

    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"it has {len(template):,} characters, and {MAX_TEMPLATE:,} are the limit")
    try:
        tree = _parsed(template)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    forms = _holds_forms(tree)
    for node in tree.find_all(nodes.Node):
        if why := _unbounded(node, forms):
            raise ValueError(f"it {why}")


def uses_date(tokenizer: Any) -> bool:
    """Whether chats hold the date on which they are rendered.

    Args:
        tokenizer: The tokenizer.
    """
    template = getattr(tokenizer, "chat_template", None)
    templates = template.values() if isinstance(template, Mapping) else (template,)
    return any(_is_dated(each) for each in templates if isinstance(each, str))


@lru_cache(maxsize=64)
def _is_dated(template: str) -> bool:
    from jinja2 import TemplateError, meta

    try:
        return "strftime_now" in meta.find_undeclared_variables(_parsed(template))
    except (TemplateError, RecursionError):
        return False


def with_date(tokenizer: Any, day: str) -> Any:
    """Copy a tokenizer so that its chat template sees a fixed date in place of the current one.

    Args:
        tokenizer: The tokenizer.
        day: The date, as in "2026-01-31". Its time of day is 00:00, and months and days have English names.

    Returns:
        The copy; the tokenizer itself if its template does not use the date.

    Raises:
        PromptError: If `day` is no date.

    Examples:
        >>> from interp.hooks.model.chat_template import with_date
        >>> with_date(tokenizer, "2026-01-31") is tokenizer
        True
    """
    try:
        when = date.fromisoformat(day)
    except (TypeError, ValueError):
        raise PromptError(f"{day!r} is not a date; write it as in 2026-01-31.") from None
    if not uses_date(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    template = changed.chat_template
    macro = _macro(when)
    changed.chat_template = (
        {name: macro + each for name, each in template.items()} if isinstance(template, Mapping) else macro + template
    )
    setattr(changed, DATE, day)
    return changed


def fixed_date(tokenizer: Any) -> str:
    """The date that `with_date` fixed; "" where there is none."""
    return str(getattr(tokenizer, DATE, ""))


def date_note(tokenizer: Any) -> str:
    """A remark on the date in chats, for the provenance of a result; "" for templates without a date.

    Args:
        tokenizer: The tokenizer of the prompts, or None.
    """
    if day := fixed_date(tokenizer):
        return f"chats hold the fixed date {day}"
    return "chats hold the date on which they were rendered" if uses_date(tokenizer) else ""


def _macro(when: date) -> str:
    """A macro that takes the place of the function `strftime_now` in a template."""
    month, day = _MONTHS[when.month - 1], _DAYS[when.weekday()]
    values = {
        "%-d": str(when.day), "%-m": str(when.month), "%-j": str(when.timetuple().tm_yday), "%d": f"{when.day:02}",
        "%m": f"{when.month:02}", "%Y": f"{when.year:04}", "%y": f"{when.year % 100:02}", "%B": month, "%b": month[:3],
        "%h": month[:3], "%A": day, "%a": day[:3], "%F": when.isoformat(), "%j": f"{when.timetuple().tm_yday:03}",
        "%e": f"{when.day:2}", "%u": str(when.isoweekday()), "%w": str(when.isoweekday() % 7), "%H": "00", "%M": "00",
        "%D": f"{when.month:02}/{when.day:02}/{when.year % 100:02}", "%S": "00", "%I": "12", "%p": "AM", "%f": "000000",
        "%T": "00:00:00", "%R": "00:00", "%X": "00:00:00", "%x": f"{when.month:02}/{when.day:02}/{when.year % 100:02}",
        "%c": f"{day[:3]} {month[:3]} {when.day:2} 00:00:00 {when.year}", "%Z": "", "%z": "", "%%": "%",
    }  # fmt: skip
    pairs = ", ".join(f"({mark!r}, {value!r})" for mark, value in values.items())
    return (
        "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format) -%}"
        f"{{%- for mark, value in [{pairs}] -%}}"
        "{%- set made.text = made.text.replace(mark, value) -%}{%- endfor -%}{{- made.text -}}{%- endmacro -%}"
    )


def _parsed(template: str) -> Any:
    """The syntax tree of a template; nothing in it is computed."""
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The block with which templates mark replies."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [Generation, ext.loopcontrols]
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).parse(template)


def _holds_forms(tree: Any) -> bool:
    """Whether a template has a percent sign, with which it could make a form such as "%9d"; dates have them too."""
    from jinja2 import nodes

    dates = {
        id(each)
        for call in tree.find_all(nodes.Call)
        if getattr(call.node, "name", "") == "strftime_now"
        for each in call.args
    }
    texts = (each.value for each in tree.find_all(nodes.Const) if id(each) not in dates)
    marked = any(isinstance(text, str) and "%" in text for text in texts)
    return marked or any(each.name == "urlencode" for each in tree.find_all(nodes.Filter))


def _unbounded(node: Any, forms: bool) -> str:
    """Why the result of a node may be of any size, or random; "" for all other nodes."""
    from jinja2 import nodes

    if isinstance(node, nodes.Pow):
        return "computes a power"
    if isinstance(node, nodes.Mul) and not (_small(node.left) or _small(node.right)):
        return "multiplies by a number that may be large"
    if isinstance(node, nodes.Mul) and len(list(node.find_all(nodes.Mul))) > 1:
        return "multiplies several times"
    if isinstance(node, nodes.Mod) and not (_narrow(node.left) or (_number(node.right) and not forms)):
        return "formats a text by a form that it computes"
    if isinstance(node, nodes.Concat) and len(node.nodes) > MAX_JOINS:
        return f"joins {len(node.nodes)} texts at once"
    if isinstance(node, nodes.Add) and len(list(node.find_all(nodes.Add))) > MAX_JOINS:
        return f"joins more than {MAX_JOINS} texts at once"
    if isinstance(node, nodes.Filter):
        return _padding(node.name, node, node.node)
    if isinstance(node, nodes.Call):
        called = node.node
        if isinstance(called, nodes.Getattr):
            return _padding(called.attr, node, called.node)
        return _padding(called.name, node, None) if isinstance(called, nodes.Name) else ""
    return ""


def _padding(name: str, call: Any, text: Any) -> str:
    """Why a filter or a method is not used; "" where its result is bounded by its arguments."""
    given = [*(call.args or ()), *(pair.value for pair in call.kwargs or ())]
    if name == "random":
        return "chooses at random, so that no two runs have the same prompts"
    if name == "map" and given and getattr(given[0], "value", None) in _PADDING:
        name = given[0].value
    if name == "format":
        return "" if _narrow(text) else "formats a text by a form that it computes"
    if name == "lipsum":
        return "makes random text"
    wide = name in _PADDING and any(not (_small(each) or _word(each)) for each in given)
    return f"pads a text ({name}) to a width that may be large" if wide else ""


def _number(node: Any) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int | float)


def _small(node: Any) -> bool:
    return _number(node) and abs(node.value) <= MAX_WIDTH


def _word(node: Any) -> bool:
    return isinstance(getattr(node, "value", None), str) and len(node.value) <= MAX_WIDTH


def _narrow(node: Any) -> bool:
    """Whether a node is a form such as "%s of %d" or "{}", without a width."""
    text = getattr(node, "value", None)
    return isinstance(text, str) and not _WIDE.search(text) and "{" not in text.replace("{}", "")


@contextmanager
def _limited() -> Iterator[None]:
    """Watch the templates that run in this thread, line by line."""
    end, size, before = time.monotonic() + SECONDS, 0, sys.gettrace()

    def watch(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal size
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() > end:
            raise TimeoutError(f"it took longer than {SECONDS:g} seconds")
        # a template yields its text piece by piece
        size += len(value) if event == "return" and isinstance(value, str) else 0
        if size > MAX_VALUE or any(map(_is_large, frame.f_locals.values())):
            raise OverflowError(f"it makes a text of more than {MAX_VALUE:,} characters")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _is_large(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > MAX_VALUE
    if isinstance(value, list):
        # the pieces of a text, which are joined at the end
        return len(value) * (len(value[-1]) if value and isinstance(value[-1], str) else 1) > MAX_VALUE
    if isinstance(value, int):
        return abs(value) > MAX_VALUE
    inner = getattr(value, "_Namespace__attrs", None)
    return isinstance(inner, dict) and any(map(_is_large, inner.values()))
