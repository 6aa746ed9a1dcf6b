"""Heads by name: "L5H3", sets of them with algebra, and the layout of a model's attention."""

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import HeadError, ModelError

_HEAD = re.compile(r"L(\d+)H(\d+)|(\d+)[.-](\d+)", re.IGNORECASE)
_HEADS_OF_LAYER = re.compile(r"L(\d+)(?:H\*)?|(\d+)\.\*", re.IGNORECASE)
_HEAD_OF_LAYERS = re.compile(r"L\*H(\d+)|\*\.(\d+)", re.IGNORECASE)
_LAYERS = re.compile(r"L(\d+)-L(\d+)", re.IGNORECASE)
_HEADS = re.compile(r"(L\d+H\d+)-(L\d+H\d+)", re.IGNORECASE)
_MAX_SHOWN = 24


class Head(NamedTuple):
    """One query head of one layer, both counted from 0; prints as "L5H3"."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, spec: Any) -> "Head":
        """Read "L5H3", "5.3", "5-3", (5, 3) or a Head.

        Raises HeadError for anything else, the number 5.3 included (5.3 and 5.30 are one number but two heads).
        """
        if isinstance(spec, str):
            found = _HEAD.fullmatch(spec.strip())
            if found:
                layer, head = (int(part) for part in found.groups() if part is not None)
                return cls(layer, head)
        elif isinstance(spec, tuple | list) and len(spec) == 2 and all(_is_index(part) for part in spec):
            layer, head = (operator.index(part) for part in spec)
            if min(layer, head) < 0:
                raise HeadError(f"{spec!r}: layers and heads count from 0, and not from the end.")
            return cls(layer, head)
        raise HeadError(f'{spec!r} does not name a head; write "L5H3", "5.3", "5-3" or (5, 3).')


@dataclass(frozen=True)
class HeadLayout:
    """How many layers, query heads, key-value heads and dimensions per head a model has."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 0
    """0 where it is not known, as for a score file."""

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise HeadError(
                f"{self.layers} layers of {self.heads} query heads over {self.kv_heads} key-value heads is no layout; "
                "give positive counts, the query heads a multiple of the key-value heads."
            )

    @classmethod
    def of(cls, model: Any) -> "HeadLayout":
        """The layout of a transformers causal language model, of a bridge over one, or of a config.

        Raises ModelError where the config does not give one count for all layers.
        """
        config = getattr(getattr(model, "original_model", model), "config", model)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers, heads = getattr(text, "num_hidden_layers", None), getattr(text, "num_attention_heads", None)
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise ModelError(
                f"{type(model).__name__} does not say how many layers and attention heads it has "
                f"(num_hidden_layers={layers!r}, num_attention_heads={heads!r}); give a causal language model."
            )
        head_dim = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
        return cls(layers, heads, _kv_heads(text, heads), head_dim)

    @property
    def size(self) -> int:
        return self.layers * self.heads

    def all(self) -> "HeadSet":
        """Every query head of the model."""
        return HeadSet(tuple(Head(layer, head) for layer in range(self.layers) for head in range(self.heads)))

    def group(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.heads // self.kv_heads)

    def check(self, heads: Any) -> None:
        """Raise HeadError, naming the first head that this model does not have."""
        for head in HeadSet.parse(heads):
            if head.layer >= self.layers:
                raise HeadError(
                    f"{head}: layer {head.layer} of a {self.layers}-layer model "
                    f"(layers run from 0 to {self.layers - 1})."
                )
            if head.head >= self.heads:
                raise HeadError(
                    f"{head}: head {head.head} of a model with {self.heads} heads a layer "
                    f"(heads run from 0 to {self.heads - 1})."
                )


@dataclass(frozen=True, repr=False)
class HeadSet:
    """Query heads, sorted and each once; `|`, `&`, `-` and `^` as for sets; str() of it can be parsed again."""

    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(sorted({Head.parse(head) for head in self.heads})))

    @classmethod
    def parse(cls, spec: Any, layout: HeadLayout | None = None) -> "HeadSet":
        """Read heads from words, pairs, or a mixture.

        Words, split by commas or spaces: "L5H3" "5.3" "5-3" a head; "L5" "L5H*" "5.*" a layer; "L*H3" "*.3" one head of
        each layer; "L8-L12" layers, both ends included; "L3H1-L3H4" heads, both ends included; "all".
        Also a Head, a (layer, head) pair, a HeadSet, or an iterable of any of these.
        With `layout` each head is checked against it; the words that stand for several heads need it.
        Raises HeadError.
        """
        heads = cls(tuple(_parse(spec, layout)))
        if layout is not None:
            layout.check(heads)
        return heads

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "l h"]) -> "HeadSet":
        """The heads where `mask` is true."""
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise HeadError(f"a mask of heads is a bool tensor [layers, heads]; got {mask.dtype} {list(mask.shape)}.")
        return cls(tuple(Head(layer, head) for layer, head in mask.nonzero().tolist()))

    def mask(self, layout: HeadLayout) -> Bool[Tensor, "l h"]:
        """True where a head of the model is in the set."""
        layout.check(self)
        mask = torch.zeros(layout.layers, layout.heads, dtype=torch.bool)
        for layer, head in self.heads:
            mask[layer, head] = True
        return mask

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer to the heads in it; layers without one are left out."""
        layers: dict[int, tuple[int, ...]] = {}
        for layer, head in self.heads:
            layers[layer] = (*layers.get(layer, ()), head)
        return layers

    def random_like(
        self,
        layout: HeadLayout,
        seed: int,
        match: Literal["free", "layer"] = "free",
        exclude: "HeadSet | None" = None,
    ) -> "HeadSet":
        """As many other heads, drawn at random: the control beside a claim about these.

        "free" draws from all the rest of the model; "layer" takes as many from each layer as this set has there, and
        what a layer cannot give from the nearest layers that can. Heads of this set and of `exclude` are never drawn.
        Raises HeadError where too few heads are left.
        """
        layout.check(self)
        rest = layout.all() - self - (exclude or HeadSet())
        if len(rest) < len(self):
            raise HeadError(
                f"{len(self)} random heads asked for, but only {len(rest)} of the {layout.size} heads are left to draw "
                "from; take a smaller set, or exclude fewer."
            )
        draw = torch.Generator().manual_seed(seed)
        if match == "free":
            return HeadSet(tuple(_sample(list(rest), len(self), draw)))
        if match != "layer":
            raise HeadError(f'match={match!r} is not a way to draw heads; use "free" or "layer".')
        pool = {layer: [Head(layer, head) for head in heads] for layer, heads in rest.by_layer().items()}
        drawn: list[Head] = []
        missing: list[int] = []
        for layer, heads in self.by_layer().items():
            taken = _sample(pool.get(layer, []), len(heads), draw)
            pool[layer] = [head for head in pool.get(layer, []) if head not in taken]
            drawn += taken
            missing += [layer] * (len(heads) - len(taken))
        for layer in missing:
            near = min(abs(layer - other) for other, left in pool.items() if left)
            left = [head for other in (layer - near, layer + near) for head in pool.get(other, [])]
            (taken,) = _sample(left, 1, draw)
            pool[taken.layer].remove(taken)
            drawn.append(taken)
        return HeadSet(tuple(drawn))

    def __or__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet(self.heads + other.heads) if isinstance(other, HeadSet) else NotImplemented

    def __and__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet(tuple({*self.heads} & {*other.heads})) if isinstance(other, HeadSet) else NotImplemented

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet(tuple({*self.heads} - {*other.heads})) if isinstance(other, HeadSet) else NotImplemented

    def __xor__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet(tuple({*self.heads} ^ {*other.heads})) if isinstance(other, HeadSet) else NotImplemented

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: Any) -> bool:
        return Head.parse(head) in self.heads

    def __str__(self) -> str:
        return ", ".join(map(str, self.heads))

    def __repr__(self) -> str:
        if len(self) <= _MAX_SHOWN:
            return f"HeadSet({self})"
        return f"HeadSet({self.heads[0]}, {self.heads[1]}, ..., {self.heads[-1]}; {len(self)} heads)"


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _kv_heads(text: Any, heads: int) -> int:
    """The key-value heads of a config; families that predate the common name say multi_query or num_kv_heads."""
    named = getattr(text, "num_key_value_heads", None)
    if isinstance(named, int):
        return named
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    older = getattr(text, "num_kv_heads", None)
    return older if isinstance(older, int) else heads


def _sample(heads: list[Head], count: int, draw: torch.Generator) -> list[Head]:
    return [heads[i] for i in torch.randperm(len(heads), generator=draw)[:count].tolist()]


def _parse(spec: Any, layout: HeadLayout | None) -> Iterable[Head]:
    if isinstance(spec, HeadSet):
        return spec.heads
    if isinstance(spec, Head):
        return (spec,)
    if isinstance(spec, str):
        words = re.sub(r"\s*-\s*", "-", spec).replace(",", " ").replace(";", " ").split()
        if not words:
            raise HeadError('an empty text names no head; write "L5H3", "L5H*", "L8-L12" or "all".')
        return [head for word in words for head in _parse_word(word, layout)]
    if isinstance(spec, tuple | list) and len(spec) == 2 and all(_is_index(part) for part in spec):
        return (Head.parse(spec),)
    if isinstance(spec, Iterable):
        return [head for part in spec for head in _parse(part, layout)]
    raise HeadError(f'{spec!r} does not name heads; write "L5H3, L7H0", (5, 3), or a list of these.')


def _parse_word(word: str, layout: HeadLayout | None) -> Iterable[Head]:
    if _HEAD.fullmatch(word):
        return (Head.parse(word),)
    if ends := _HEADS.fullmatch(word):
        first, last = (Head.parse(end) for end in ends.groups())
        if first <= last and first.layer == last.layer:
            return [Head(first.layer, head) for head in range(first.head, last.head + 1)]
        return _between(word, first, last, layout)
    if found := _LAYERS.fullmatch(word):
        first, last = Head(int(found[1]), 0), Head(int(found[2]), _require_layout(word, layout).heads - 1)
        return _between(word, first, last, layout)
    if found := _HEADS_OF_LAYER.fullmatch(word):
        layer = int(found[1] or found[2])
        return [Head(layer, head) for head in range(_require_layout(word, layout).heads)]
    if found := _HEAD_OF_LAYERS.fullmatch(word):
        head = int(found[1] or found[2])
        return [Head(layer, head) for layer in range(_require_layout(word, layout).layers)]
    if word.lower() == "all":
        return _require_layout(word, layout).all()
    raise HeadError(f'"{word}" does not name heads; write "L5H3", "5.3", "L5H*", "L8-L12", "L3H1-L3H4" or "all".')


def _between(word: str, first: Head, last: Head, layout: HeadLayout | None) -> Iterable[Head]:
    if first > last:
        raise HeadError(f'"{word}" runs backwards; write the lower end first.')
    known = _require_layout(word, layout)
    known.check([first, last])
    return [head for head in known.all() if first <= head <= last]


def _require_layout(word: str, layout: HeadLayout | None) -> HeadLayout:
    if layout is None:
        raise HeadError(f'"{word}" stands for several heads; pass layout=HeadLayout.of(model) to say which there are.')
    return layout
