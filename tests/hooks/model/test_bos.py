"""The first token: the rule of the tokenizer, its description, and copies that differ in it."""

import copy
import warnings

import pytest
import tiny_chat_model
from tokenizers import processors
from tokenizers_tiny import byte_fallback, byte_level, words

import interp
from interp.analyses import tasks
from interp.errors import PromptError
from interp.hooks.model.bos import begins_chat, bos_rule, first_tokens, last_tokens, with_bos
from interp.hooks.model.provenance import Provenance, tokenizer_hash
from interp.hooks.prompts.prompts import Prompts

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
WITHOUT = TEMPLATE.removeprefix("{{ bos_token }}")
TOKENIZERS = {
    "adds it": lambda: byte_level(bos=True, chat=False),
    "adds both ends": lambda: byte_level(bos=True, eos=True, chat=False),
    "adds nothing": lambda: byte_level(chat=False),
    "adds the end": lambda: byte_level(eos=True, chat=False),
    "trims offsets": lambda: byte_level(trim=True, chat=False),
    "has no post-processor": byte_fallback,
}


def encoded(tokenizer, text="Paris in the rain"):
    return Prompts.encode(tokenizer, [text], spans={"town": "Paris"})[0]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_copy_begins_texts_as_it_is_told_and_changes_nothing_else(name, bos):
    tokenizer = TOKENIZERS[name]()
    before, stored = encoded(tokenizer), tokenizer_hash(tokenizer)
    changed = with_bos(tokenizer, bos)
    after = encoded(changed)
    first = tokenizer.bos_token_id
    plain = before.ids[1:] if before.ids[0] == first else before.ids
    assert after.ids == ((first, *plain) if bos else plain)
    (start, stop), (low, high) = before.spans["town"][0], after.spans["town"][0]
    assert before.ids[start:stop] == after.ids[low:high]
    # the original stays as it was
    assert (encoded(tokenizer), tokenizer_hash(tokenizer)) == (before, stored)
    assert first_tokens(changed) == ((first,) if bos else ())
    assert encoded(with_bos(with_bos(tokenizer, not bos), bos)).ids == after.ids


@pytest.mark.parametrize("template", [TEMPLATE, WITHOUT])
@pytest.mark.parametrize("bos", [True, False])
def test_chats_follow_it_too(template, bos):
    tokenizer = byte_level(bos=True)
    tokenizer.chat_template = template
    assert begins_chat(tokenizer) is (template == TEMPLATE)
    changed = with_bos(tokenizer, bos)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    prompt = Prompts.encode(changed, [chat], continue_final=False)[0]
    assert prompt.text == ("<s>" if bos else "") + "user:hello</s>assistant:yes</s>"
    assert (prompt.ids[0] == tokenizer.bos_token_id) is bos
    assert begins_chat(changed) is bos
    assert begins_chat(with_bos(changed, not bos)) is not bos


def test_what_a_template_writes_as_text_remains():
    tokenizer = byte_level()
    assert begins_chat(with_bos(tokenizer, False)) is True
    assert tokenizer.chat_template == with_bos(tokenizer, True).chat_template


@pytest.mark.parametrize(
    ("tokenizer", "rule"),
    [
        (byte_level(bos=True, chat=False), "texts: <s> (default of the tokenizer)"),
        (byte_level(), "texts: none added; chats: <s> (default of the tokenizer)"),
        (with_bos(byte_level(), True), "texts: <s>; chats: <s> (set by bos=True)"),
        (with_bos(byte_level(bos=True, chat=False), False), "texts: none added (set by bos=False)"),
        (
            byte_level(bos=True, eos=True, chat=False),
            "texts: <s>; left out after texts: </s> (default of the tokenizer)",
        ),
        (words(), "texts: none added (default of the tokenizer)"),
        (None, ""),
    ],
)
def test_the_rule_in_words_is_part_of_the_provenance(tiny_model, tokenizer, rule):
    assert bos_rule(tokenizer) == rule
    assert Provenance.of(tiny_model("llama"), tokenizer).bos == rule


def test_tokenizers_without_bos_are_refused():
    with pytest.raises(PromptError, match=r"^bos=True was given, but the tokenizer has no BOS token; leave bos=None"):
        with_bos(words(), True)


MAKERS = {
    "needle": lambda t: tasks.needle(t, lengths=(320,), n=2, chat=False),
    "passages": lambda t: tasks.passages(t, n=2, length=40),
    "repeated": lambda t: tasks.repeated(t, n=9, batch=2),
    "contexts": lambda t: tasks.contexts(t, questions=1, each=2, chat=False),
    "documents": lambda t: sum(tasks.documents(t, n=1, count=2, chat=False), Prompts(())),
    "entities": lambda t: tasks.entities(t, n=2) + tasks.entities(t, n=2, context="text", random=True),
    "relations": lambda t: tasks.relations(t, n=2),
    "ioi": lambda t: sum(tasks.ioi(t, n=2), Prompts(())),
    "colored_objects": lambda t: sum(tasks.colored_objects(t, n=2), Prompts(())),
    "passkeys": lambda t: tasks.passkeys(t, n=1, keys=2),
}
CHATS = {
    "needle": lambda t: tasks.needle(t, lengths=(1200,), n=2),
    "contexts": lambda t: tasks.contexts(t, questions=1, each=2, length=1200),
    "documents": lambda t: sum(tasks.documents(t, n=1, count=2), Prompts(())),
    "injection": lambda t: tasks.injection(t, n=2),
}


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_texts_of_every_built_in_task_begin_as_the_tokenizer_begins_them(demo, name, bos):
    tokenizer = demo.tokenizer if bos is None else with_bos(demo.tokenizer, bos)
    for prompt in MAKERS[name](tokenizer):
        assert (prompt.ids[0] == tokenizer.bos_token_id) is bool(bos)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_chats_of_every_built_in_task_begin_as_the_template_begins_them(name, bos):
    tokenizer = byte_level(bos=not bos)
    tokenizer.chat_template = TEMPLATE if bos else WITHOUT
    for prompt in CHATS[name](tokenizer):
        assert (prompt.ids[0] == tokenizer.bos_token_id) is bos
        assert prompt.ids[1] != tokenizer.bos_token_id


def test_a_model_is_loaded_with_the_rule_changed(tmp_path):
    folder = tiny_chat_model.folder(tmp_path / "model")
    assert first_tokens(interp.load(folder).tokenizer) == ()
    assert first_tokens(interp.load(folder, bos=True).tokenizer) == (0,)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "end" in name])
@pytest.mark.parametrize("keep_end", [False, True])
def test_what_a_tokenizer_adds_after_a_text_is_left_out_and_reported(name, keep_end):
    tokenizer = TOKENIZERS[name]()
    end = tokenizer.eos_token_id
    assert last_tokens(tokenizer) == (end,)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prompts = Prompts.encode(tokenizer, ["Paris in the rain", "a b"], spans={"all": (0, 3)}, keep_end=keep_end)
    assert [str(w.message)[:38] for w in told] == ([] if keep_end else ["the tokenizer adds '</s>' after each t"] * 2)
    whole = tokenizer(["Paris in the rain", "a b"])["input_ids"]
    assert [list(prompt.ids) for prompt in prompts] == (whole if keep_end else [ids[:-1] for ids in whole])
    assert prompts[1].spans["all"][-1][1] == len(prompts[1]) - keep_end


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "end" not in name])
def test_nothing_is_left_out_where_a_tokenizer_adds_nothing_after_a_text(name, recwarn):
    tokenizer = TOKENIZERS[name]()
    assert last_tokens(tokenizer) == ()
    # an end token that the text itself holds is part of it
    for text in ("Paris in the rain", "Paris</s>"):
        assert Prompts.encode(tokenizer, [text])[0].ids == tuple(tokenizer(text)["input_ids"])
    assert not recwarn.list


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore:the tokenizer adds")
def test_texts_of_every_built_in_task_have_not_ended(demo, name):
    tokenizer = copy.deepcopy(demo.tokenizer)
    end = tokenizer.eos_token
    template = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    plain = MAKERS[name](demo.tokenizer)
    assert [prompt.ids for prompt in MAKERS[name](tokenizer)] == [prompt.ids for prompt in plain]


def test_a_chat_that_ends_without_a_reply_is_reported():
    tokenizer = byte_level(bos=True)
    tokenizer.chat_template = TEMPLATE
    user, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}
    with pytest.warns(UserWarning, match="the chat template ends prompt 0 with '</s>' and begins no reply"):
        Prompts.encode(tokenizer, [[user]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prompts.encode(tokenizer, [[user, answer]])
        Prompts.encode(tokenizer, [[user]], add_generation_prompt=False)
        Prompts.encode(byte_level(), [[user]])
