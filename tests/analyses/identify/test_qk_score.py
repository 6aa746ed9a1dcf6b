"""QK-score against queries and keys of an eager model, and its errors."""

import math

import pytest
import torch
from capture_oracle import content

from interp.analyses import identify, tasks
from interp.analyses.identify.qk_score import check_options
from interp.errors import PromptError, SpanError
from interp.hooks.prompts.prompts import Prompts
from interp.report.words import summary
from interp.testing.families import VOCAB

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gpt_oss")


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def quiz(n=3):
    spans = [{"options": [(3 * d + 1, 3 * d + 4) for d in range(4 + i % 2)]} for i in range(n)]
    rows = [tokens(24 + i, i) for i in range(n)]
    for row, marks in zip(rows, spans, strict=True):
        for _, stop in marks["options"]:
            row[stop - 1] = 7
    return Prompts.from_ids(rows, spans=spans, meta=[{"option": i} for i in range(n)])


def assert_qk_score_equals_queries_and_keys(model, eager, prompts):
    by_fit, by_pattern = (identify.qk_score(model, prompts, attention=a, right_only=False) for a in (False, True))
    assert (by_fit.name, by_pattern.name) == ("qk_score", "qk_score_attention")
    for i, prompt in enumerate(prompts):
        q, k = content(model, prompt)
        ends = [stop - 1 for _, stop in prompt.spans["options"]]
        fit = torch.einsum("lhd,lhkd->lhk", q[:, :, -1], k[:, :, ends]) / math.sqrt(q.shape[-1])
        for scores, wanted in ((by_fit, fit), (by_pattern, eager(model, prompt)[:, :, -1, ends])):
            torch.testing.assert_close(scores.extras["options"][i, ..., : len(ends)], wanted, atol=1e-4, rtol=0)
            assert torch.equal(scores.per_prompt[i], (wanted.argmax(-1) == prompt.meta["option"]).float())


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_score_equals_queries_and_keys(tiny_model, eager, name):
    assert_qk_score_equals_queries_and_keys(tiny_model(name), eager, quiz())


def test_qk_score_equals_queries_and_keys_on_the_demo_model(demo, eager):
    model, tokenizer = demo
    assert_qk_score_equals_queries_and_keys(model, eager, tasks.get("choice").prompts(tokenizer, n=2))


def answered(model, prompt, letters):
    """The letter that a model prefers after a prompt, by the logits of its first token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1]
    return max(letters, key=lambda letter: float(logits[letters[letter]]))


def test_questions_count_where_the_demo_model_answers_right(demo):
    model, tokenizer = demo
    prompts = tasks.get("choice").prompts(tokenizer, n=12)
    letters = {letter: tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in "ABCD"}
    right = [answered(model, prompt, letters) == "ABCD"[prompt.meta["option"]] for prompt in prompts]
    assert 0 < sum(right) < len(right)
    gated, every = identify.qk_score(model, prompts), identify.qk_score(model, prompts, right_only=False)
    assert (~gated.per_prompt.isnan()).flatten(1).all(1).tolist() == right
    assert gated.counted == sum(right)
    assert torch.equal(gated.per_prompt[right], every.per_prompt[right])


def test_where_the_model_answers_none_no_head_has_a_score(tiny_model):
    model, prompts = tiny_model("llama"), quiz()
    best = []
    for prompt in prompts:
        with torch.no_grad():
            best.append(int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax()))

    def with_answers(right, wrong):
        meta = [
            {**prompt.meta, "right": [[r]], "wrong": [[w]]} for prompt, r, w in zip(prompts, right, wrong, strict=True)
        ]
        return Prompts.from_ids([p.ids for p in prompts], spans=[dict(p.spans) for p in prompts], meta=meta)

    others = [token + 1 for token in best]
    none = identify.qk_score(model, with_answers(others, best))
    assert none.per_prompt.isnan().all()
    assert (none.counted, none.n_scored, none.top(3)) == (0, 0, [])
    assert "0 of 3 prompts used" in summary(none, None).certainty
    one = identify.qk_score(model, with_answers([best[0], *others[1:]], [others[0], *best[1:]]))
    assert one.counted == 1
    with pytest.raises(PromptError, match='prompt 0 has no "right" continuations'):
        identify.qk_score(model, prompts)


# Llama 3 (also Qwen 2 and later, whose numbers have one digit): newlines join the spaces and signs before them
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_pairs(pattern):
    """A tokenizer whose vocabulary has two newlines as one token, split by a pattern before that."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", ".Ċ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), (".", "Ċ")]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="Ċ")


@pytest.mark.parametrize("pattern", [LLAMA_3, GPT_2], ids=["Llama 3", "GPT-2"])
def test_the_options_of_the_task_end_with_one_token(pattern):
    tokenizer = byte_pairs(pattern)
    prompts = tasks.get("choice").prompts(tokenizer, n=40)
    check_options(prompts)
    for prompt in prompts:
        newline = tokenizer.convert_tokens_to_ids("Ċ")
        assert all(prompt.ids[stop - 1] == newline for _, stop in prompt.spans["options"])


def options(tokenizer, ends):
    """A question with options that end as given, and a line after them."""
    lines = [f"{mark}. {word}{end}" for mark, word, end in zip("ABC", ("red", "blue", "green"), ends, strict=True)]
    item = {"text": f"Which?\n{''.join(lines)}Answer:", "spans": {"options": lines}, "meta": {"option": 0}}
    return Prompts.encode(tokenizer, [item])


def test_options_whose_ends_are_different_tokens_are_refused(tiny_model):
    tokenizer = byte_pairs(LLAMA_3)
    model = tiny_model("llama")
    joined = options(tokenizer, ("\n", "\n", "\n\n"))
    with pytest.raises(PromptError, match=r"options of prompt 0 end with different tokens \('\\n', '\\n', '\\n\\n'\)"):
        identify.qk_score(model, joined, right_only=False)
    # the same text, with a pattern that leaves newlines apart: the last option ends before the empty line
    check_options(options(byte_pairs(LLAMA_3), ("\n", "\n", "\n")))
    apart = options(byte_pairs(GPT_2.replace(r"\s+(?!\S)|\s+", r"\s")), ("\n", "\n", "\n\n"))
    check_options(apart)
    with pytest.raises(PromptError, match="different tokens"):
        check_options(options(tokenizer, ("\n", ".\n", "\n")))
    ids = Prompts.from_ids([tokens(20)], spans=[{"options": [(1, 3), (3, 5)]}], meta=[{"option": 0}])
    with pytest.raises(PromptError, match=r"end with different tokens \(\d+, \d+\), by which a head could distinguish"):
        identify.qk_score(model, ids)


def test_errors_of_qk_score(tiny_model):
    model, ids = tiny_model("llama"), [tokens(20)]
    with pytest.raises(SpanError, match='prompt 0 has no span "options"'):
        identify.qk_score(model, Prompts.from_ids(ids))
    with pytest.raises(SpanError, match='"options" of prompt 0 has one range'):
        identify.qk_score(model, Prompts.from_ids(ids, spans=[{"options": (1, 3)}], meta=[{"option": 0}]))
    two = [{"options": [(1, 3), (3, 5)]}]
    for meta, said in (({}, "None"), ({"option": 2}, "2")):
        with pytest.raises(PromptError, match=f'"option" of prompt 0 is {said}; give the number, from 0'):
            identify.qk_score(model, Prompts.from_ids(ids, spans=two, meta=[meta]))
