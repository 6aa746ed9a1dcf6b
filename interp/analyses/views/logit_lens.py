"""What heads write, as tokens: their output, or one attended token's value, on its way through the unembedding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.analyses.measures.head_outputs import HeadOutputs, bridged, by_length
from interp.analyses.views.attention_lens import Lens, Top, extremes
from interp.errors import HeadError, ModelError, ScoreError, SpanError, UsageError
from interp.hooks.model.heads import Head, HeadLayout, HeadSet
from interp.hooks.model.provenance import Provenance
from interp.hooks.prompts.batch_spans import TokenSpan
from interp.hooks.prompts.prompts import Prompt, Prompts
from interp.hooks.read.capture import capture, check_context
from interp.hooks.read.keep import rows, v
from interp.hooks.read.reductions import normalize_spans

COPIED = 5
"""a head copies a token that is among so many of the first that it writes for it"""


class Token(NamedTuple):
    """A token of the vocabulary and what was added to its logit."""

    text: str
    id: int
    logit: float


class Place(NamedTuple):
    """A token of a prompt."""

    text: str
    id: int
    position: int


class Reading(NamedTuple):
    """What a head would write if it attended to one token alone."""

    token: Place
    attention: float
    """that the query pays to it in this run"""
    rank: int
    """of the token itself among all that is written, 0 for the most raised"""
    writes: tuple[Token, ...]


@dataclass(frozen=True)
class LogitLens:
    """The tokens that heads raise and lower most, for some prompts: see `vocabulary`."""

    heads: tuple[str, ...]
    labels: tuple[str, ...]
    """one per prompt"""
    queries: tuple[Place, ...]
    """where each prompt was read"""
    raised: tuple[tuple[tuple[Token, ...], ...], ...]
    """[prompt][head][rank], the most raised first"""
    lowered: tuple[tuple[tuple[Token, ...], ...], ...]
    """[prompt][head][rank], the most lowered first"""
    lens: int | None = None
    """layer whose heads were read through a trained lens"""
    provenance: Provenance | None = None

    def of(self, head: Any, prompt: int = 0) -> tuple[Token, ...]:
        """What one head raises, the most first. Raises HeadError, UsageError."""
        return self.raised[_prompt(prompt, self.labels)][_number(head, self.heads)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it, see from_dict."""
        return _told(self) | {"raised": self.raised, "lowered": self.lowered, "lens": self.lens}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "LogitLens":
        """The inverse of to_dict, through JSON too. Raises ScoreError."""
        try:
            raised, lowered = (
                tuple(tuple(tuple(map(_token, head)) for head in prompt) for prompt in content[side])
                for side in ("raised", "lowered")
            )
            lens = None if content.get("lens") is None else int(content["lens"])
            made = cls(**_heard(content), raised=raised, lowered=lowered, lens=lens)
            _check_shape(made.raised + made.lowered, made.heads, 2 * len(made.labels))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError(f"this vocabulary view is broken ({error}): make it again.") from error
        return made


@dataclass(frozen=True)
class OvTokens:
    """What heads would write for each token of a span, were it all they attend to: see `ov_tokens`."""

    heads: tuple[str, ...]
    labels: tuple[str, ...]
    queries: tuple[Place, ...]
    """whose run the attention and the norms' scales are from"""
    span: str
    read: tuple[tuple[tuple[Reading, ...], ...], ...]
    """[prompt][head][token of the span]"""
    provenance: Provenance | None = None

    def of(self, head: Any, prompt: int = 0) -> tuple[Reading, ...]:
        """What one head reads and writes. Raises HeadError, UsageError."""
        return self.read[_prompt(prompt, self.labels)][_number(head, self.heads)]

    def copying(self, head: Any, top: int = COPIED) -> float:
        """Share of the span's tokens, over all prompts, that are among the `top` that the head writes for them."""
        number = _number(head, self.heads)
        ranks = [reading.rank for prompt in self.read for reading in prompt[number]]
        return sum(rank < top for rank in ranks) / len(ranks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can say it, see from_dict."""
        return _told(self) | {"span": self.span, "read": self.read}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "OvTokens":
        """The inverse of to_dict, through JSON too. Raises ScoreError."""
        try:
            read = tuple(tuple(tuple(map(_reading, head)) for head in prompt) for prompt in content["read"])
            made = cls(**_heard(content), span=str(content["span"]), read=read)
            _check_shape(read, made.heads, len(made.labels))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScoreError(f"this view of what heads copy is broken ({error}): make it again.") from error
        return made


def logit_lens(
    model: nn.Module,
    prompts: Prompts,
    heads: Any,
    *,
    k: int = 10,
    queries: str = "last",
    lens: Lens | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> LogitLens:
    """The tokens whose logits a head raises and lowers most where it writes, in each prompt.

    logit[b h v] = ((z[b h d] W_O[h d m]) / s[b] * gamma[m]) . W_U[m v], s the scale of the final norm in this run;
    LayerNorm centres what the head wrote, and a norm after attention (Gemma 2 and 3, OLMo 2) is applied with its scale
    in this run. In logits, before a soft-cap or scale of the model's logits, without any bias; what is added to all
    tokens alike changes no probability, so compare tokens.
    heads: anything HeadSet.parse takes, in its order. queries: "last", or a span, of which the last token counts; what
    comes after it is not read. lens: the heads of its layer go through their trained map instead of W_U; compare with
    the plain view.
    Raises HeadError, SpanError, UsageError (k, a lens of another layer), ScoreError (a lens of another model),
    ModelError (no bridge, training, or heads that do not add up to what attention writes).
    Source: nostalgebraist 2020 (logit lens) for single heads; `lens`: Sakarvadia et al. 2310.16270.
    Cannot show: what a head does through later layers; a head that writes for them raises tokens that mean nothing.
    """
    layout = HeadLayout.of(model)
    chosen = _chosen(heads, layout)
    if lens is not None:
        lens.check(model)
        if lens.layer not in chosen.by_layer():
            raise UsageError(
                f"the lens is of layer {lens.layer}, where none of {chosen} is: name a head of that layer."
            )
    cut, places = _read_at(model, prompts, queries)
    raised: list[Any] = [()] * len(prompts)
    lowered: list[Any] = [()] * len(prompts)
    name = _namer(prompts.tokenizer)
    bar = tqdm(total=len(prompts), desc="logit_lens", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        for index, (batch,) in by_length(cut, batch_size=batch_size):
            run = HeadOutputs.of(tl, batch, layout)
            run.check_readout(run.logits.topk(2).indices)
            both: list[tuple[Any, Any]] = []
            for head in chosen:
                x = run.read(run.heads[head][None])[0]
                weight, bias = (tl.W_U, None) if lens is None or head.layer != lens.layer else lens.of(head)
                up, down, _ = extremes(x, weight.to(x.device), bias, k)
                both.append((_tokens(up, name), _tokens(down, name)))
            for row, number in enumerate(index):
                raised[number], lowered[number] = (tuple(head[side][row] for head in both) for side in (0, 1))
            bar.update(len(index))
    return LogitLens(
        tuple(map(str, chosen)),
        labels_of(prompts),
        places,
        tuple(raised),
        tuple(lowered),
        None if lens is None else lens.layer,
        Provenance.of(model, prompts.tokenizer),
    )


def ov_tokens(
    model: nn.Module,
    prompts: Prompts,
    heads: Any,
    span: Any,
    *,
    k: int = 5,
    queries: str = "last",
    batch_size: int = 8,
    progress: bool = False,
) -> OvTokens:
    """What a head would write at the query if it attended to one token alone, for each token of a span.

    logit[b h k v] = ((v[b h k d] W_O[h d m]) / s[b] * gamma[m]) . W_U[m v], v as in this run (a kv head's values serve
    its group), the norms as in `vocabulary` and with the scales of the query's position, so that the sum over all k of
    pattern[b h q k] logit[b h k v] is what `vocabulary` gives there. In logits.
    span: a name, a position or a range (start, stop); tokens after the query do not count. queries: as in `vocabulary`.
    `.copying(head)`: the share of tokens that are among the first five written for them.
    Raises as `vocabulary`, SpanError for a span that no token before the query is in, and ModelError where attention is
    not the sum of its values (a gate after it).
    Source: Elhage et al. 2021, OV circuits. Differs: the values of this run, not of the embedding alone.
    Cannot show: that the head attends there (see `attention`), nor what later layers make of it.
    """
    layout = HeadLayout.of(model)
    chosen = _chosen(heads, layout)
    (where,) = normalize_spans((span,))
    cut, places = _read_at(model, prompts, queries)
    spans = _positions(prompts, where, [place.position for place in places])
    found: list[Any] = [()] * len(prompts)
    name = _namer(prompts.tokenizer)
    bar = tqdm(total=len(prompts), desc="values", disable=not progress, delay=2, leave=False)
    with bar, bridged(model) as tl, torch.no_grad():
        for index, (batch,) in by_length(cut, batch_size=batch_size):
            with (
                capture(tl, v(), batch, heads=chosen) as values,
                capture(tl, rows(), batch, heads=chosen, queries=[batch.lengths[0] - 1]) as looked,
            ):
                run = HeadOutputs.of(tl, batch, layout)
            held, pattern = values[v()].float(), looked[rows()][:, :, 0].float()
            _check_values(run, chosen, held, pattern)
            for row, (number, prompt) in enumerate(zip(index, batch, strict=True)):
                one, keys = run.row(row), spans[number]
                found[number] = tuple(
                    _readings(one, head, prompt, keys, held[row, i, keys], pattern[row, i, keys], k, name)
                    for i, head in enumerate(chosen)
                )
            bar.update(len(index))
    said = span if isinstance(span, str) else str(where)
    provenance = Provenance.of(model, prompts.tokenizer)
    return OvTokens(tuple(map(str, chosen)), labels_of(prompts), places, said, tuple(found), provenance)


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, its spaces included; its name in the vocabulary where it is no text of its own."""
    if tokenizer is None:
        return str(token)
    text, known = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if str(known).startswith("▁"):
        # sentencepiece, which leaves out a space at the beginning
        return str(known).replace("▁", " ")
    # an id past the end of the vocabulary, or a piece of a character
    return str(token) if known is None else text if text and "\ufffd" not in text else str(known)


def _readings(
    run: HeadOutputs,
    head: Head,
    prompt: Prompt,
    keys: list[int],
    values: Float[Tensor, "k d"],
    pattern: Float[Tensor, "k"],
    k: int,
    name: Callable[[int], str],
) -> tuple[Reading, ...]:
    w_o = run.tl.blocks[head.layer].attn.W_O[head.head].float()
    added = run.added(head.layer, (values.to(w_o.device) @ w_o)[:, None])
    own = [prompt.ids[key] for key in keys]
    up, _, ranks = extremes(run.read(added)[:, 0], run.tl.W_U, None, k, torch.tensor(own))
    places = [Place(name(token), token, key) for token, key in zip(own, keys, strict=True)]
    shares = [short(share) for share in pattern.tolist()]
    return tuple(map(Reading, places, shares, ranks.tolist(), _tokens(up, name)))


def _check_values(
    run: HeadOutputs, heads: HeadSet, values: Float[Tensor, "b x k d"], pattern: Float[Tensor, "b x k"]
) -> None:
    made = torch.einsum("bxk,bxkd->bxd", pattern, values)
    written = torch.stack([run.cache[f"blocks.{head.layer}.attn.hook_z"][:, 0, head.head] for head in heads], 1).cpu()
    eps = torch.finfo(run.tl.W_U.dtype).eps
    if (made - written).norm() > max(1e-3, 4 * eps) * written.norm():
        raise ModelError(
            "what these heads write is not their values weighed by their attention: this model changes it before the "
            "output projection, so use vocabulary, which reads what was written."
        )


def _tokens(top: Top, name: Callable[[int], str]) -> list[tuple[Token, ...]]:
    """[n][k]"""
    values, at = (part.tolist() for part in top)
    return [
        tuple(Token(name(token), token, short(value)) for value, token in zip(*row, strict=True))
        for row in zip(values, at, strict=True)
    ]


def _chosen(heads: Any, layout: HeadLayout) -> HeadSet:
    chosen = HeadSet.parse(heads, layout)
    if not len(chosen):
        raise HeadError('no heads given: name at least one, as in "L5H3".')
    return chosen


def _read_at(model: nn.Module, prompts: Prompts, queries: str) -> tuple[Prompts, tuple[Place, ...]]:
    """The prompts up to the position that is read, which no causal model looks beyond, and that position."""
    check_context(model, prompts)
    stops = list(prompts.lengths) if queries == "last" else [ranges[-1][1] for ranges in prompts.span(queries)]
    items = tuple(replace(prompt, ids=prompt.ids[:stop]) for prompt, stop in zip(prompts, stops, strict=True))
    name = _namer(prompts.tokenizer)
    places = tuple(Place(name(prompt.ids[-1]), prompt.ids[-1], len(prompt) - 1) for prompt in items)
    return replace(prompts, items=items), places


def _positions(prompts: Prompts, where: TokenSpan, last: Sequence[int]) -> list[list[int]]:
    """The positions of a span in each prompt that are not after the last one read. Raises SpanError."""
    if isinstance(where, str):
        ranges = prompts.span(where)
    else:
        ranges = [((where, where + 1) if isinstance(where, int) else where,)] * len(prompts)
    found = []
    for number, (spans, end) in enumerate(zip(ranges, last, strict=True)):
        found.append([key for start, stop in spans for key in range(start, min(stop, end + 1))])
        if not found[-1]:
            raise SpanError(
                f"prompt {number} has no token of span {where!r} up to position {end}, where it is read: name a span "
                "that lies before."
            )
    return found


def labels_of(prompts: Prompts) -> tuple[str, ...]:
    return tuple(
        str(prompt.meta.get("id") or prompt.meta.get("question") or f"prompt {number}")
        for number, prompt in enumerate(prompts)
    )


def _namer(tokenizer: Any) -> Callable[[int], str]:
    return cache(partial(token_text, tokenizer))


def _number(head: Any, heads: tuple[str, ...]) -> int:
    name = str(Head.parse(head))
    if name not in heads:
        raise HeadError(f"{name} is not in this view, which has {', '.join(heads)}: name one of these.")
    return heads.index(name)


def _prompt(prompt: int, labels: tuple[str, ...]) -> int:
    if not 0 <= prompt < len(labels):
        raise UsageError(f"prompt {prompt} of a view of {len(labels)}: give a number from 0 to {len(labels) - 1}.")
    return prompt


def short(value: float) -> float:
    """Five digits: what a file keeps."""
    return float(f"{value:.5g}")


def _told(view: LogitLens | OvTokens) -> dict[str, Any]:
    made = None if view.provenance is None else view.provenance.to_dict()
    return {"heads": view.heads, "labels": view.labels, "queries": view.queries, "provenance": made}


def _heard(content: Mapping[str, Any]) -> dict[str, Any]:
    made = content.get("provenance")
    return {
        "heads": tuple(str(Head.parse(head)) for head in content["heads"]),
        "labels": tuple(map(str, content["labels"])),
        "queries": tuple(map(_place, content["queries"])),
        "provenance": None if made is None else Provenance.from_dict(made),
    }


def _token(stored: Any) -> Token:
    text, token, logit = stored
    return Token(str(text), int(token), float(logit))


def _place(stored: Any) -> Place:
    text, token, position = stored
    return Place(str(text), int(token), int(position))


def _reading(stored: Any) -> Reading:
    token, attention, rank, writes = stored
    return Reading(_place(token), float(attention), int(rank), tuple(map(_token, writes)))


def _check_shape(rows: Sequence[Sequence[Any]], heads: tuple[str, ...], count: int) -> None:
    if len(rows) != count or any(len(row) != len(heads) for row in rows):
        raise ValueError("its entries are not one for each prompt and head")
