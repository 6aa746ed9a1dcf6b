"""Results of a run with known numbers, for tests of figures and reports; no model is needed but for the explorer."""

from dataclasses import replace
from typing import Any

import tiny_chat_model
import torch

from interp.analyses.results.head_scores import HeadScores
from interp.analyses.results.trial import Trial
from interp.analyses.results.trials import Trials
from interp.analyses.views.explore import Explored, explore
from interp.analyses.views.logit_lens import LogitLens
from interp.analyses.views.ov_tokens import OvTokens
from interp.analyses.views.qk_projection import Cloud, QKProjection
from interp.analyses.views.token_attention import TokenAttention
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.prompts import Prompts
from interp.runs.results import RunResults

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:alert(2)'>x</a>"
    "<!-- \" ' onclick=alert(3) {{ 7 * 7 }} %{x} \u2028\u2029\u202e\x00\x1b\ud800"
)
SAFE_HOSTILE = HOSTILE.replace("\ud800", "")
"""without the half character, which JSON cannot hold"""
LAYERS, HEADS, N_PROMPTS = 6, 4, 12
LAYOUT = HeadLayout(LAYERS, HEADS, 2)
ORIGIN = Provenance(
    "tiny-model", "LlamaForCausalLM", "c" * 16, "w" * 16, versions={"torch": "2.9.0"}, dtype="float32", device="cpu",
    command="interp report tiny-model --seed 3", time="2026-03-02T14:05:00+00:00", note="dequantised from 4 bit",
)  # fmt: skip
TOP, RANDOM, BY_LAYER = (HeadSet.parse(text) for text in ("L1H2 L2H2", "L0H0 L0H1", "L5H0 L5H1"))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def table(name: str, seed: int, threshold: float | None = None, **more: Any) -> HeadScores:
    """Low scores for all heads, and one high head, L{seed + 1}H2."""
    values = rand(N_PROMPTS, LAYERS, HEADS, seed=seed) * 0.2
    values[:, seed + 1, 2] += 0.6
    return HeadScores(
        name, values, "share of attention", kv_heads=2, threshold=threshold, provenance=ORIGIN, **more
    )  # fmt: skip


def sinks(**more: Any) -> HeadScores:
    received = rand(N_PROMPTS, LAYERS, HEADS, 32, seed=9)
    sink = (received[..., 0] > 0.3).float()
    return HeadScores(
        "sinks", received[..., 0], "share of attention", 2, 0.3, {"column_threshold": 0.1}, ORIGIN,
        {"positions": received, "sink": sink}, labels=("64 tokens",) * N_PROMPTS, **more,
    )  # fmt: skip


def ablation(
    right: tuple[int, ...] = (8, 1, 8, 6, 7, 7), text: str = "", name: str = "retrieval", n_prompts: int = 8
) -> Trials:
    """An ablation test with so many right replies: baseline, top, random twice, and each set of random by layer."""
    n_sets = len(right) - 4
    conditions = ("baseline", "top", "random", "random", *["random by layer"] * n_sets)
    heads = (HeadSet(()), TOP, RANDOM, RANDOM, *[BY_LAYER] * n_sets)
    trials = tuple(
        Trial(
            condition,
            {"accuracy": tuple(float(n < count) for n in range(n_prompts))},
            ablated,
            size=len(ablated),
            draw=max(0, place - 4) if place > 3 else place % 2 if place > 1 else 0,
            matched="top" if place > 1 else "",
            replies=tuple(text or ("it is saffron" if n < count else "no idea") for n in range(n_prompts)),
        )
        for place, (condition, ablated, count) in enumerate(zip(conditions, heads, right, strict=True))
    )
    return Trials(
        name, trials, "zero", "Accuracy with heads ablated", shares=("accuracy",),
        control="random by layer", claim="larger effect", n_random_sets=n_sets,
        questions=(text or "which spice?",) * n_prompts, answers=(text or "saffron",) * n_prompts, provenance=ORIGIN,
    )  # fmt: skip


def curve(sizes: tuple[int, ...] = (1, 3, 5), n_sets: int = 99) -> Trials:
    """A causal curve: the loss rises by 1 with each head of "induction", and by 0.1 to 0.2 with each random head."""
    base = tuple(float(value) for value in 2 + rand(N_PROMPTS, seed=4))
    trials = [Trial("baseline", {"loss": base})]
    for size in sizes:
        random = [("random by layer", 0.1 + 0.001 * draw, draw) for draw in range(n_sets)]
        for condition, slope, draw in (("induction", 1.0, 0), ("random", 0.1, 0), ("random", 0.2, 1), *random):
            values = tuple(value + slope * size for value in base)
            heads = HeadSet(tuple(Head(layer, draw) for layer in range(size)))
            matched = "induction" if condition.startswith("random") else ""
            trials.append(Trial(condition, {"loss": values}, heads, size, draw, matched=matched))
    return Trials(
        "induction", tuple(trials), "zero", units={"loss": "nats per token"}, provenance=ORIGIN,
        control="random by layer", claim="larger effect", n_random_sets=n_sets,
    )  # fmt: skip


def kept_keys(n_prompts: int = 12, whole: float = 0.75, better: str = "HeadKV-R") -> Trials:
    """Selectors of known numbers: one above random keys at 40 %, StreamingLLM below them, all equal at 10 %."""
    right = {("baseline", 1.0): whole, ("random", 0.4): 0.25, ("StreamingLLM", 0.4): 0.0, (better, 0.4): 0.75}
    right |= {(name, 0.1): 0.125 for name, _ in list(right) if name != "baseline"}
    trials = [
        Trial(
            name,
            {"right": (value + shift,) * n_prompts, "loss": (2.0,) * n_prompts},
            size=share,
            task=task,
            facts={"kept": share},
        )
        for task, shift in (("needle", 0.0), ("new facts", 0.125 if whole else 0.0))
        for (name, share), value in right.items()
    ]
    return Trials(
        "kv", tuple(trials), title="Key selectors", size_name="share of the context's keys that is kept",
        shares=("right",), units={"loss": "nats per token"}, provenance=ORIGIN,
    )  # fmt: skip


def influence() -> Trials:
    base = tuple(float(value) for value in 2 + rand(N_PROMPTS, seed=5))
    rise = tuple(float(value) for value in rand(N_PROMPTS, seed=6))
    rows = [("heads", 1.0, 0, TOP), ("random", 0.1, 0, RANDOM), ("random", 0.05, 1, RANDOM)]
    trials = [
        Trial(
            condition,
            {
                "influence": tuple(factor * value for value in rise),
                "loss": tuple(one * (1 + factor * value) for one, value in zip(base, rise, strict=True)),
            },
            heads,
            2,
            draw,
        )
        for condition, factor, draw, heads in rows
    ]
    return Trials(
        "attention_influence", (*trials, Trial("baseline", {"loss": base})), "uniform", provenance=ORIGIN,
        questions=tuple(f"document {n}" for n in range(N_PROMPTS)), units={"loss": "nats per token"},
    )  # fmt: skip


def attention(text: str = "") -> TokenAttention:
    tokens = (text or "<|im_start|>", "user", "\n", *(f" word{i}" for i in range(500)), " saff", "ron", text or "?")
    n = len(tokens)
    weights = torch.stack([torch.eye(n)[503], torch.full((n,), 1 / n)])
    return TokenAttention(
        text or "Which spice?", tokens, ("L1H2", "L0H0"), weights, {text or "answer": ((503, 505),)}, text or "saffron",
        ORIGIN,
    )  # fmt: skip


def lens(text: str = " the", label: str = "one", logits: tuple[float, ...] = (2.0, 1.0, 0.5)) -> LogitLens:
    k, down = len(logits), 100 + torch.arange(len(logits))
    return LogitLens(
        heads=("L0H1", "L2H0"), labels=(label, "two"), query_ids=torch.tensor([0, 4]),
        query_positions=torch.tensor([7, 8]), raised_ids=torch.arange(k).expand(2, 2, k),
        raised_logits=torch.tensor(logits).expand(2, 2, k), lowered_ids=down.expand(2, 2, k),
        lowered_logits=-torch.tensor(logits).expand(2, 2, k),
        texts={"0": text, "4": "x"} | {str(i): f"t{i}" for i in (1, 2, 3)} | {str(int(i)): "d" for i in down},
        provenance=ORIGIN,
    )  # fmt: skip


def ov(text: str = " saffron", count: int = 3) -> OvTokens:
    """Two heads; the attention of the second runs the other way."""
    shares = torch.arange(count) / (count + 1)
    ids = torch.arange(count)
    written = torch.stack([ids, torch.full((count,), 999)], -1)
    return OvTokens(
        heads=("L0H1", "L2H0"), labels=("one",), query_ids=torch.tensor([0]), query_positions=torch.tensor([count]),
        span="needle", ids=ids[None], positions=10 + ids[None], attention=torch.stack([shares, shares.flip(0)])[None],
        ranks=ids.expand(1, 2, count), written_ids=written.expand(1, 2, count, 2),
        written_logits=torch.tensor([1.5, 0.5]).expand(1, 2, count, 2),
        texts={str(i): text for i in range(count)} | {"999": "b"}, from_last=True, provenance=ORIGIN,
    )  # fmt: skip


def cloud(head: str, explained: tuple[float, float] | None = (0.312, 0.105)) -> Cloud:
    shift, steps = float(head[1]), torch.arange(6.0)
    queries = torch.stack([steps + shift, torch.ones(6)], 1)
    keys = torch.stack([-steps, torch.full((6,), 2.0 + shift)], 1)
    return Cloud(head, queries, keys, explained, 0.42, 0.81, 0.25, 0.125, 1.5)


def projection(text: str = " the", label: str = "one", **more: Any) -> QKProjection:
    settings: dict[str, Any] = {
        "method": "pca", "clouds": (cloud("L0H1"), cloud("L2H0")), "tokens": (text, "b", "c", "d", "e", "f"),
        "positions": torch.tensor([0, 1, 2, 0, 1, 5]), "prompts": torch.tensor([0, 0, 0, 1, 1, 1]),
        "labels": (label, "two"), "provenance": ORIGIN,
    }  # fmt: skip
    return QKProjection(**settings | more)


def explored(text: str = "") -> Explored:
    """150 random tokens in a tiny model of two layers, shown as the first layers of the run's model."""
    model, tokenizer = tiny_chat_model.model(), tiny_chat_model.tokenizer()
    ids = torch.randint(3, 60, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    found = explore(model, Prompts.from_ids([ids], tokenizer=tokenizer), heads="L1H2, L0H0", title=text or "A text")
    summaries = {name: torch.nn.functional.pad(x, (0, 0, 0, LAYERS - len(x))) for name, x in found.summaries.items()}
    return replace(
        found, tokens=(text or "first", *found.tokens[1:]), layout=LAYOUT, summaries=summaries,
        marks={text or "mark": ((3, 9),)}, provenance=ORIGIN,
    )  # fmt: skip


def tables() -> dict[str, Any]:
    """Three tables, the control of the first, and attention on a text."""
    retrieval = table("retrieval", 0, 0.1)
    values = retrieval.per_prompt.clone()
    values[:3] = torch.nan
    return {
        "retrieval": replace(retrieval, per_prompt=values, settings={"form": "decode"}),
        "retrieval.control": ablation(),
        "induction": table("induction", 1, 0.3),
        "sinks": sinks(),
        "token_attention": attention(),
    }


def run(results: dict[str, Any] | None = None, **more: Any) -> RunResults:
    settings: dict[str, Any] = {"settings": {"sizes": {"needle_length": 512}}, "seconds": 192.0}
    return RunResults(ORIGIN, LAYOUT, tables() if results is None else results, **settings | more)


def whole(text: str = "") -> RunResults:
    """A run with every type of result, with `text` wherever text comes from outside."""
    outside = text or "a plain question"
    retrieval = replace(table("retrieval", 0, 0.1), labels=(outside,) * N_PROMPTS)
    results = {
        "retrieval": replace(retrieval, unit=text or retrieval.unit),
        "retrieval.control": ablation(text=text),
        "induction": table("induction", 1, 0.3),
        "induction.control": curve(),
        "sinks": replace(sinks(), settings={"of": outside}),
        "attention_influence": influence(),
        "explore": explored(text),
        "qk_projection": projection(text or " the", outside),
        "logit_lens": lens(text or " the", outside),
        "ov_tokens": ov(text or " saffron"),
        "token_attention": attention(text),
        "kv": kept_keys(better=text or "HeadKV-R"),
    }
    return RunResults(
        replace(ORIGIN, model=text or ORIGIN.model, note=outside), LAYOUT, results, {"name": outside},
        {"retrieval": (outside,) * N_PROMPTS}, {"sahara": outside}, 192.0,
    )  # fmt: skip
