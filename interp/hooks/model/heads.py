"""Sets of attention heads with set algebra, and the head layout of a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import HeadError, ModelError
from interp.hooks.model.config_values import largest_of_layers, values_of_layers
from interp.hooks.model.head_names import Head as Head
from interp.hooks.model.head_names import parse_heads

_MAX_SHOWN = 24  # heads that repr() of a set lists in full


@dataclass(frozen=True)
class HeadLayout:
    """The number of layers, query heads per layer, key-value heads per layer, and dimensions per head of a model.

    Raises:
        HeadError: If a count is not positive, or the query heads are not a multiple of the key-value heads.

    Examples:
        >>> interp.HeadLayout(layers=2, heads=4, kv_heads=2).size
        8
    """

    layers: int
    """Number of layers."""
    heads: int
    """Number of query heads in each layer."""
    kv_heads: int
    """Number of key-value heads in each layer."""
    head_dim: int = 0
    """Dimensions of the output of a head, the largest where layers differ; 0 where unknown, as for a score file."""

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise HeadError(
                f"{self.layers} layers of {self.heads} query heads over {self.kv_heads} key-value heads is not a valid "
                "layout; give positive counts, with the query heads a multiple of the key-value heads."
            )

    @classmethod
    def of(cls, model: Any) -> "HeadLayout":
        """Read the layout of a model.

        Args:
            model: A transformers causal language model, a TransformerBridge over one, or a config.

        Returns:
            The layout.

        Raises:
            ModelError: If the config does not give one number of heads for all layers.

        Examples:
            >>> interp.HeadLayout.of(model)
            HeadLayout(layers=2, heads=4, kv_heads=2, head_dim=16)
        """
        config = getattr(getattr(model, "original_model", model), "config", model)
        # of an encoder and a decoder, the decoder is the part whose heads can be read
        part = {"decoder": True} if getattr(config, "is_encoder_decoder", False) else {}
        text = config.get_text_config(**part) if hasattr(config, "get_text_config") else config
        layers = getattr(text, "num_hidden_layers", None)
        heads, kv_heads = (_number_of(model, text, name) for name in ("num_attention_heads", "num_key_value_heads"))
        if getattr(text, "is_decoder", False) and not part:
            # a decoder that was taken from its encoder has a config of both
            layers, heads = getattr(text, "decoder_layers", layers), getattr(text, "decoder_attention_heads", heads)
        if not isinstance(layers, int) or not isinstance(heads, int):
            raise ModelError(
                f"the config of {type(model).__name__} does not give the number of layers and attention heads "
                f"(num_hidden_layers={layers!r}, num_attention_heads={heads!r}); give a causal language model."
            )
        # values may be narrower than keys, and outputs are as wide as values
        width = largest_of_layers(text, "v_head_dim") or largest_of_layers(text, "head_dim")
        width = width or (largest_of_layers(text, "hidden_size") or 0) // heads
        return cls(layers, heads, kv_heads if isinstance(kv_heads, int) else _older_kv_heads(text, heads), width)

    @property
    def size(self) -> int:
        """Number of query heads in the whole model."""
        return self.layers * self.heads

    def all(self) -> "HeadSet":
        """The set of all query heads of the model.

        Examples:
            >>> len(interp.HeadLayout.of(model).all())
            8
        """
        return HeadSet(tuple(Head(layer, head) for layer in range(self.layers) for head in range(self.heads)))

    def group(self, head: int) -> int:
        """The key-value head that a query head reads.

        Args:
            head: Index of the query head in its layer.

        Returns:
            Index of the key-value head in the same layer.

        Examples:
            >>> interp.HeadLayout.of(model).group(3)
            1
        """
        return head // (self.heads // self.kv_heads)

    def check(self, heads: Any) -> None:
        """Check that the model has all of the given heads.

        Args:
            heads: Heads in any form that `HeadSet.parse` reads.

        Raises:
            HeadError: If the model does not have one of the heads; the message names the first such head.

        Examples:
            >>> interp.HeadLayout.of(model).check("L1H3")
        """
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
    """A sorted set of query heads without duplicates.

    `|`, `&`, `-` and `^` work as for Python sets. The result of str() can be parsed again.

    Examples:
        >>> heads = interp.HeadSet.parse("L0H1, L1H3")
        >>> heads | interp.HeadSet.parse("L1H0")
        HeadSet(L0H1, L1H0, L1H3)
        >>> str(heads)
        'L0H1, L1H3'
    """

    heads: tuple[Head, ...] = ()
    """The heads in order of layer and head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(sorted({Head.parse(head) for head in self.heads})))

    @classmethod
    def parse(cls, spec: Any, layout: HeadLayout | None = None) -> "HeadSet":
        """Parse heads from words, pairs, or a mixture of these.

        A text holds words separated by commas, semicolons or spaces:

        - "L5H3", "5.3" or "5-3": one head;
        - "L5", "L5H*" or "5.*": every head of a layer;
        - "L*H3" or "*.3": the same head of every layer;
        - "L8-L12": a range of layers, both ends included;
        - "L3H1-L3H4": a range of heads, both ends included;
        - "all": every head of the model.

        Args:
            spec: A text as above, a Head, a (layer, head) pair, a HeadSet, or an iterable of any of these.
            layout: The layout that each head is checked against. Words that cover several heads need it, except a
                range of heads within one layer.

        Returns:
            The set of heads.

        Raises:
            HeadError: If a word does not name heads, a word needs `layout`, or the model does not have a head.

        Examples:
            >>> interp.HeadSet.parse("L0H1 1.3")
            HeadSet(L0H1, L1H3)
            >>> interp.HeadSet.parse("L1", interp.HeadLayout.of(model))
            HeadSet(L1H0, L1H1, L1H2, L1H3)
        """
        heads = cls(tuple(parse_heads(spec, layout)))
        if layout is not None:
            layout.check(heads)
        return heads

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "l h"]) -> "HeadSet":
        """Make the set of the heads at which a mask is true.

        Args:
            mask: Bool `[l h]`.

        Returns:
            The set of heads.

        Raises:
            HeadError: If `mask` is not a bool tensor with two dimensions.

        Examples:
            >>> interp.HeadSet.from_mask(torch.eye(2, 4, dtype=torch.bool))
            HeadSet(L0H0, L1H1)
        """
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise HeadError(
                f"the mask of heads is a {mask.dtype} tensor of shape {list(mask.shape)}; "
                "give a bool tensor [layers, heads]."
            )
        return cls(tuple(Head(layer, head) for layer, head in mask.nonzero().tolist()))

    def mask(self, layout: HeadLayout) -> Bool[Tensor, "l h"]:
        """Make a mask that is true at the heads of the set.

        Args:
            layout: The layout of the model.

        Returns:
            Bool `[l h]`.

        Raises:
            HeadError: If the model does not have one of the heads.

        Examples:
            >>> interp.HeadSet.parse("L1H3").mask(interp.HeadLayout.of(model)).sum()
            tensor(1)
        """
        layout.check(self)
        mask = torch.zeros(layout.layers, layout.heads, dtype=torch.bool, device="cpu")
        for layer, head in self.heads:
            mask[layer, head] = True
        return mask

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """The heads of each layer; layers without heads of the set are left out.

        Examples:
            >>> interp.HeadSet.parse("L0H1, L1H0, L1H3").by_layer()
            {0: (1,), 1: (0, 3)}
        """
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
        """Draw a random set of the same size from the other heads of the model, as a control for this set.

        Heads of this set and of `exclude` are never drawn.

        Args:
            layout: The layout of the model.
            seed: Seed of the random draw.
            match: "free" draws from all remaining heads of the model. "layer" draws from each layer as many heads as
                this set has there; heads that a layer cannot provide come from the nearest layers that can.
            exclude: Further heads that are not drawn.

        Returns:
            The random set.

        Raises:
            HeadError: If too few heads are left, or `match` is unknown.

        Examples:
            >>> layout = interp.HeadLayout.of(model)
            >>> control = interp.HeadSet.parse("L0H1, L1H3").random_like(layout, seed=0, match="layer")
            >>> [len(heads) for heads in control.by_layer().values()]
            [1, 1]
        """
        layout.check(self)
        rest = layout.all() - self - (exclude or HeadSet())
        if len(rest) < len(self):
            raise HeadError(
                f"{len(self)} random heads were requested, but only {len(rest)} of the {layout.size} heads are left to "
                "draw from; use a smaller set, or exclude fewer heads."
            )
        draw = torch.Generator("cpu").manual_seed(seed)
        if match == "free":
            return HeadSet(tuple(_sample(list(rest), len(self), draw)))
        if match != "layer":
            raise HeadError(f"unknown match {match!r}; choose from 'free', 'layer'.")
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


def permute_in_layers(
    sets: Sequence[HeadSet], layout: HeadLayout, seed: int, fixed: HeadSet | None = None
) -> list[HeadSet]:
    """Map head sets by one random permutation of the heads within each layer.

    A permuted set has as many heads of each layer as the given one and may share heads with it. If the heads of a layer
    are alike, the given set is a random one among its permutations, which makes a comparison with them exact.

    Args:
        sets: Head sets; all are mapped by the same permutation.
        layout: The layout of the model.
        seed: Seed of the permutation.
        fixed: Heads that stay where they are.

    Returns:
        The permuted sets.

    Raises:
        HeadError: If a set has a head that the model does not have.

    Examples:
        >>> from interp.hooks.model.heads import permute_in_layers
        >>> layout = interp.HeadLayout(layers=2, heads=4, kv_heads=2)
        >>> (drawn,) = permute_in_layers([interp.HeadSet.parse("L0H1, L1H3")], layout, seed=0)
        >>> [head.layer for head in drawn]
        [0, 1]
    """
    draw, moved = torch.Generator("cpu").manual_seed(seed), {}
    for heads in sets:
        layout.check(heads)
    stay = set(fixed or ())
    for layer in sorted({head.layer for heads in sets for head in heads}):
        pool = [head for head in (Head(layer, i) for i in range(layout.heads)) if head not in stay]
        moved |= dict(zip(pool, _sample(pool, len(pool), draw), strict=True))
    return [HeadSet(tuple(moved.get(head, head) for head in heads)) for heads in sets]


def _number_of(model: Any, text: Any, name: str) -> Any:
    """The number of a kind of heads, which all layers have. Raises ModelError where they differ."""
    found = sorted(set(values_of_layers(text, name)), key=str)
    if len(found) > 1:
        raise ModelError(
            f"the layers of {type(model).__name__} differ in {name} ({', '.join(map(str, found))}), where interp needs "
            "one number for all layers; use a model whose layers have the same number of heads."
        )
    return found[0]


def _older_kv_heads(text: Any, heads: int) -> int:
    """The number of key-value heads in a config of the older families, which use multi_query or num_kv_heads for it."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    older = getattr(text, "num_kv_heads", None)
    return older if isinstance(older, int) else heads


def _sample(heads: list[Head], count: int, draw: torch.Generator) -> list[Head]:
    return [heads[i] for i in torch.randperm(len(heads), generator=draw, device="cpu")[:count].tolist()]
