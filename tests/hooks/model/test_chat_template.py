"""Chat templates are programs of others: they run within limits, and see a date that can be fixed."""

import time

import pytest
from tokenizers_tiny import byte_level

import interp
from interp.errors import PromptError
from interp.hooks.model import chat_template
from interp.hooks.model.bos import begins_chat
from interp.hooks.model.chat_template import date_note, fixed_date, render, uses_date, with_date
from interp.hooks.model.provenance import template_hash

CHAT = [{"role": "user", "content": "hello"}]
TWICE = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}"
UNBOUNDED = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(1000000000) %}a{% endfor %}",
    "a macro that calls itself": "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "a power": "{{ 9 ** 99999999 }}",
    "a text times a number": "{{ 'a' * 10000000000 }}",
    "a text times numbers": "{{ 'a' * 1000 * 1000 * 1000 }}",
    "a variable times a variable": "{% set n = 'a' %}{{ n * messages|length }}",
    "doubled by ~": TWICE.replace("OP", "~"),
    "doubled by +": TWICE.replace("OP", "+"),
    "a doubled list": TWICE.replace("OP", "+").replace("'ab'", "[1]"),
    "a doubled number": TWICE.replace("OP", "+").replace("'ab'", "9"),
    "much output": "{% for i in range(99999) %}{{ messages[0]['content'] * 1000 }}{% endfor %}",
    "much output of a macro": "{% macro m() %}{% for i in range(99999) %}{{ 'aaaaaa' * 999 }}{% endfor %}{% endmacro %}"
    "{{ m() }}",
    "padded by a method": "{{ 'a'.ljust(9999999999) }}",
    "padded by a filter": "{{ 'a'|center(9999999999) }}",
    "padded by a map": "{{ ['a']|map('center', 999999999)|list }}",
    "padded by a form": "{{ '%9999999999d' % 1 }}",
    "padded by a form of its own": "{% set f = '%' ~ '99999999' ~ 'd' %}{{ f % 1 }}",
    "padded by format": "{{ '{:>9999999999}'.format(1) }}",
    "indented": "{{ messages|tojson(indent=999999999) }}{{ 'a'|indent(999999999) }}",
    "random words": "{{ lipsum(99999) }}",
}
FAILING = {
    "a random choice": "{{ [1, 2]|random }}",
    "a division by zero": "{{ 1 / 0 }}",
    "no such attribute": "{{ messages.x.y.z }}",
    "no such entry": "{{ messages[7]['content'] }}",
    "no such function": "{{ today() }}",
    "a wrong type": "{{ messages + 'a' }}",
    "no template": "{% for %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a refusal": "{{ raise_exception('no system message') }}",
    "a huge template": "a" * 2_000_000,
    "an attribute of Python": "{{ ''.__class__.__mro__ }}",
}
HARMLESS = {
    "a remainder": "{% for m in messages %}{{ loop.index0 % 2 }}{{ m.content }}{% endfor %}",
    "a date": "{{ strftime_now('%d') * 0 }}{{ messages|length % 2 }}",
    "a short repeat": "{{ '-' * 3 }}{{ messages[0].content }}",
    "a short padding": "{{ messages[0].content.ljust(9) }}{{ messages|tojson(indent=2) }}",
    "a simple form": "{{ '%s: %d' % ('a', 2) }}{{ '{} {}'.format(1, 2) }}",
    "a mark of replies": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "control of loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
}


def tokenizer(template):
    made = byte_level(bos=True, pad=True)
    made.chat_template = template
    return made


def test_what_is_unbounded_is_refused_before_it_is_compiled():
    at_run_time = ("a loop", "a long", "a macro", "doubled", "a doubled", "much")
    for case in (case for case in UNBOUNDED if not case.startswith(at_run_time)):
        with pytest.raises(ValueError, match=r"^it (computes|multiplies|pads|formats|makes random)"):
            chat_template.check_template(UNBOUNDED[case])


@pytest.mark.parametrize("case", UNBOUNDED | FAILING)
def test_a_template_cannot_take_all_time_or_memory(case):
    made, start = tokenizer((UNBOUNDED | FAILING)[case]), time.monotonic()
    with pytest.raises(PromptError, match=r"the chat template refuses prompt 0 \(.+\); change the messages, or give"):
        interp.Prompts.encode(made, [CHAT])
    assert begins_chat(made) is None
    assert time.monotonic() - start < 2 * chat_template.SECONDS + 2


@pytest.mark.parametrize("case", HARMLESS)
def test_a_template_within_the_limits_is_rendered_as_before(case):
    made = tokenizer(HARMLESS[case])
    assert render(made, CHAT) == made.apply_chat_template(CHAT, tokenize=False)


def test_the_trace_of_a_debugger_is_put_back():
    import sys

    before = sys.gettrace()
    render(tokenizer(HARMLESS["a remainder"]), CHAT)
    with pytest.raises(PromptError):
        render(tokenizer(FAILING["no such attribute"]), CHAT)
    assert sys.gettrace() is before


DATED = {
    "called": "{{ strftime_now('%d %b %Y') }}",
    "if it is there": "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% else %}none{% endif %}",
    "kept": "{% set day = strftime_now('%A, %B %-d') %}{% for m in messages %}{{ day ~ m.content }}{% endfor %}",
    "in a macro": "{% macro head() %}Today: {{ strftime_now('%d/%m/%y') }}{% endmacro %}{{ head() }}",
    "in a loop": "{% for m in messages %}{{ strftime_now('%j') }}{% endfor %}",
    "with a percent sign": "{{ strftime_now('100%% %Y') }}",
    "the time": "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}",
}
EXPECTED = {
    "called": "05 Mar 2026", "if it is there": "2026-03-05", "kept": "Thursday, March 5hello",
    "in a macro": "Today: 05/03/26", "in a loop": "064", "with a percent sign": "100% 2026",
    "the time": "2026-03-05T00:00:00",
}  # fmt: skip


@pytest.mark.parametrize("case", DATED)
def test_a_date_can_be_fixed(case):
    made = tokenizer(DATED[case])
    fixed = with_date(made, "2026-03-05")
    assert render(fixed, CHAT) == EXPECTED[case]
    assert uses_date(made)
    assert not uses_date(fixed)
    assert (fixed_date(made), fixed_date(fixed)) == ("", "2026-03-05")
    assert date_note(made) == "chats hold the date on which they were rendered"
    assert date_note(fixed) == "chats hold the fixed date 2026-03-05"
    assert template_hash(fixed) != template_hash(with_date(made, "2026-03-06"))
    # the given tokenizer stays as it is
    assert made.chat_template == DATED[case]


def test_several_templates_are_all_fixed():
    made = tokenizer({"default": DATED["called"], "tools": DATED["in a loop"]})
    fixed = with_date(made, "2026-03-05")
    assert fixed.apply_chat_template(CHAT, tokenize=False) == EXPECTED["called"]
    assert fixed.apply_chat_template(CHAT, chat_template="tools", tokenize=False) == "064"


@pytest.mark.parametrize("template", [None, HARMLESS["a remainder"], "{{ 'strftime_now' }}", "{% for %}"])
def test_a_template_without_a_date_is_left_alone(template):
    made = tokenizer(template)
    assert with_date(made, "2026-03-05") is made
    assert date_note(made) == ""


def test_a_date_is_a_date():
    with pytest.raises(PromptError, match=r"'tomorrow' is not a date; write it as in 2026-01-31"):
        with_date(tokenizer(DATED["called"]), "tomorrow")
