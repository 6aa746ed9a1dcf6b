"""The checks of `doctor`, one function each.

A check returns whether the model passes and a sentence with the details; None means that the check reports a fact or
does not apply.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from interp.hooks.model.bos import last_tokens
from interp.hooks.model.config_values import values_of_layers
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.layers import attention_layers, projection_inputs
from interp.hooks.model.weights import compute_dtype, input_device
from interp.hooks.prompts.prompts import Prompts
from interp.hooks.read import keep as keeps
from interp.hooks.read.capture import capture, run
from interp.hooks.seam import AttentionTap, ReadRequest, Site, tapping
from interp.kernels.contract import Call, Lse, Mass

PROMPT_LENGTHS = (24, 33)
"""Tokens of each test prompt."""
N_NEW_TOKENS = 4
"""Tokens that the generation check decodes."""
TOLERANCE_BY_DTYPE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Largest allowed norm of a difference along the last axis, as a share of the norm of the expected values."""


@dataclass(eq=False)
class ProbeTap(AttentionTap):
    """A tap that records the attention calls, and how far the sums of attention rows are from one."""

    reads: bool = True
    """Whether the tap reads at all; False leaves the seam idle."""
    calls: dict[int, Call] = field(default_factory=dict)
    """The first call of each layer."""
    row_error: float = 0.0
    """Largest distance of a row's sum from one, with its learned sink."""
    widths: dict[int, int] = field(default_factory=dict)
    """Width of the input of each output projection."""

    def at(self, layer: int) -> bool:
        return self.reads

    def want(self, site: Site) -> ReadRequest | None:
        self.calls.setdefault(site.layer, site.call)
        every = torch.ones(site.call.sizes[0], 1, site.call.sizes[4], device=site.call.q.device)
        return ReadRequest((Mass(every), Lse()))

    def take(self, site: Site, want: ReadRequest, values: tuple[Any, ...]) -> None:
        total, lse = values[0][..., 0], values[1]
        if site.call.sinks is not None:
            total = total + torch.exp(site.call.sinks.to(lse)[None, :, None] - lse)
        self.row_error = max(self.row_error, float((total - 1).abs().masked_fill(lse == -torch.inf, 0).max()))

    def width(self, layer: int, x: Tensor) -> None:
        """Record the width of the input of an output projection."""
        self.widths[layer] = x.shape[-1]


@dataclass(eq=False)
class ModelUnderTest:
    """The model that is checked, its tokenizer, and the calls recorded so far."""

    model: Any
    tokenizer: Any
    probe: ProbeTap = field(default_factory=ProbeTap)
    """The calls of the first run, which the check "seam" records."""

    @property
    def layers(self) -> list[int]:
        """The layers whose attention calls were recorded."""
        return sorted(self.probe.calls)

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def prompts(self) -> Prompts:
        """Prompts of random tokens without special tokens, which a model may treat differently."""
        special: set[int] = set()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(self.config, name, None)
            special |= set(found) if isinstance(found, list) else set() if found is None else {found}
        usual = torch.tensor([i for i in range(min(self.config.vocab_size, 4096)) if i not in special])
        draw = torch.Generator().manual_seed(0)
        limit = (getattr(self.config, "max_position_embeddings", None) or 10**6) - N_NEW_TOKENS
        rows = [usual[torch.randint(len(usual), (min(n, limit),), generator=draw)].tolist() for n in PROMPT_LENGTHS]
        return Prompts.from_ids(rows, pad_id=min(special, default=0))

    @property
    def ends(self) -> list[int]:
        """The token ids that end a generation."""
        found = self.model.generation_config.eos_token_id
        return found if isinstance(found, list) else [] if found is None else [found]

    @property
    def tolerance(self) -> float:
        return TOLERANCE_BY_DTYPE.get(compute_dtype(self.model), 0.15)

    def logits(self, prompts: Prompts) -> Tensor:
        """Compute the logits of the real tokens of all prompts, concatenated: float `[tokens vocabulary]`."""
        padded = run(self.model, prompts).logits.float().cpu()
        return padded[prompts.tensors()["attention_mask"].bool()]

    def compare(self, a: Tensor, b: Tensor, what: str) -> tuple[bool, str]:
        """Compare values with the expected ones, within the tolerance of the dtype.

        Args:
            a: The values.
            b: The expected values.
            what: The subject of the sentence, such as "logits".

        Returns:
            Whether they agree, and a sentence with the difference.
        """
        error = float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())
        return error <= self.tolerance, f"{what} differ by {error:.0e} of their norm ({self.tolerance:.0e} is allowed)"


Check = Callable[[ModelUnderTest], tuple[bool | None, str]]
"""A function from the model to whether it passes (None for a fact, or where it does not apply) and a sentence."""


def _seam(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Every layer calls the attention function that the model is set to use."""
    layers = attention_layers(subject.model)
    with tapping(subject.model, subject.probe), projection_inputs(subject.model, layers, subject.probe.width):
        run(subject.model, subject.prompts)
    expected = HeadLayout.of(subject.model).layers
    missing = sorted(set(range(expected)) - set(subject.probe.calls))
    if missing:
        return False, (
            f"layers {missing} of {expected} never called the attention function that the model is set to use; read "
            "the other layers with layers=, or report the architecture"
        )
    return True, f"all {expected} layers are reached"


def _needs_calls(check: Check) -> Check:
    """Skip a check where no attention call was recorded."""

    def checked(subject: ModelUnderTest) -> tuple[bool | None, str]:
        return check(subject) if subject.probe.calls else (None, "skipped, because no attention call was recorded")

    return checked


@_needs_calls
def _idle(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """An idle seam does not change the logits."""
    # a batch without padding may have no mask at all
    batches = (subject.prompts, subject.prompts[:1])
    alone = [subject.logits(batch) for batch in batches]
    with tapping(subject.model, ProbeTap(reads=False)):
        idle = [subject.logits(batch) for batch in batches]
    if all(map(torch.equal, alone, idle)):
        return True, "logits are identical to the bit while nothing is read"
    largest = max(float((before - now).abs().max()) for before, now in zip(alone, idle, strict=True))
    change = f"logits change by {largest:.0e} while nothing is read"
    if all(map(torch.equal, alone, map(subject.logits, batches))):
        return False, f"{change}, because a layer computes with the attention mask; do not use interp on this model"
    return None, f"{change}, but they also change from run to run"


@_needs_calls
def _reading(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Reading attention changes the logits only within the tolerance."""
    alone = subject.logits(subject.prompts)
    with tapping(subject.model, ProbeTap()):
        read = subject.logits(subject.prompts)
    return subject.compare(read, alone, "logits with and without reading")


@_needs_calls
def _rows(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Each attention row sums to one, less the share of its learned sink."""
    return (
        subject.probe.row_error < 1e-4,
        f"sums of attention rows with their learned sinks differ from one by {subject.probe.row_error:.0e}",
    )


@_needs_calls
def _padding(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """A prompt gives the same logits and attention in a padded batch and alone."""
    prompts, item = subject.prompts, keeps.entropy()
    n = len(prompts[0])
    with capture(subject.model, item, prompts, layers=subject.layers) as batch:
        padded = subject.logits(prompts)[:n]
    with capture(subject.model, item, prompts[:1], layers=subject.layers) as single:
        alone = subject.logits(prompts[:1])
    ok, detail = subject.compare(padded, alone, "logits of a prompt in a padded batch and alone")
    same, more = subject.compare(batch[item][:1, ..., :n], single[item], "entropies of its rows")
    if not ok and not subject.compare(subject.logits(prompts)[:n], subject.logits(prompts[:1]), "")[0]:
        detail += " (the model does this without interp as well; run prompts one by one, as with batch_size=1)"
    return ok and same, f"{detail}; {more}"


@_needs_calls
def _generation(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Cached generation gives the tokens and attention of one run over the whole text."""
    prompts, item = subject.prompts[:1], keeps.entropy()
    inputs = prompts.tensors(input_device(subject.model))
    settings = {"max_new_tokens": N_NEW_TOKENS, "min_new_tokens": N_NEW_TOKENS, "do_sample": False, "num_beams": 1}
    # a penalty in the model's generation settings would select other tokens than the likeliest
    settings |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    settings["pad_token_id"] = prompts.pad_id
    with capture(subject.model, item, layers=subject.layers) as cached:
        tokens = subject.model.generate(**inputs, **settings)[0].tolist()
    with capture(subject.model, item, layers=subject.layers) as whole:
        logits = subject.logits(Prompts.from_ids([tokens[:-1]]))[-N_NEW_TOKENS:]
    # min_new_tokens excludes the end tokens
    chosen = logits.gather(-1, torch.tensor(tokens[-N_NEW_TOKENS:])[:, None])[:, 0]
    likeliest = logits.index_fill(-1, torch.tensor(subject.ends, dtype=torch.int64), -torch.inf).amax(-1)
    short = float((likeliest - chosen).max() / logits.abs().max())
    ok = short <= subject.tolerance
    tail = "are the likeliest in a full run" if ok else f"are {short:.0e} less likely than the best in a full run"
    same, more = subject.compare(cached[item], whole[item], "entropies of its rows")
    return ok and same, f"{N_NEW_TOKENS} tokens generated with the cache {tail}; {more}"


def _heads(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """The head layout of the config is that of the attention calls."""
    layout = HeadLayout.of(subject.model)
    wrong = [f"there is a layer {layer}" for layer in subject.layers if layer >= layout.layers]
    # layers of two kinds may have heads of two widths; keys may be wider than values, which the outputs follow
    stated_widths = {layout.head_dim, *values_of_layers(subject.config, "head_dim")}
    for layer, call in sorted(subject.probe.calls.items()):
        seen = HeadLayout(layout.layers, call.sizes[1], call.sizes[2], call.v.shape[-1])
        if replace(seen, head_dim=layout.head_dim) != layout or seen.head_dim not in stated_widths:
            wrong.append(f"layer {layer} has {_shape(seen)}")
        width = subject.probe.widths.get(layer)
        if width is not None and width != call.sizes[1] * call.v.shape[-1]:
            wrong.append(f"the output projection of layer {layer} has {width} inputs")
    if wrong:
        stated = f"{layout.layers} layers of {_shape(layout)}"
        return False, f"the config states {stated}, but {', '.join(wrong[:4])}; correct the config"
    if not subject.probe.calls:
        return None, f"{_shape(layout)} according to the config; no attention call was recorded"
    widths = " and ".join(map(str, sorted({call.v.shape[-1] for call in subject.probe.calls.values()})))
    return True, f"{layout.layers} layers of {_shape(layout, widths)}"


def _shape(layout: HeadLayout, widths: str = "") -> str:
    return f"{layout.heads} query heads over {layout.kv_heads} kv heads of dimension {widths or layout.head_dim}"


def _windows(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """The sliding windows of the config are those of the attention calls."""
    calls, types = subject.probe.calls, getattr(subject.config, "layer_types", None)
    dense = [layer for layer, call in calls.items() if call.mask is not None]
    wrong = []
    for layer, call in calls.items():
        if types is not None and layer < len(types) and layer not in dense:
            sliding = types[layer] == "sliding_attention"
            expected = getattr(subject.config, "sliding_window", None) if sliding else None
            if types[layer] in ("sliding_attention", "full_attention") and call.window != expected:
                wrong.append(
                    f"layer {layer} attends to {_window(call.window)}, but the config states {_window(expected)}"
                )
    if wrong:
        return False, f"{'; '.join(wrong[:4])}; correct layer_types and sliding_window of the config"
    sizes = {layer: call.window for layer, call in calls.items() if call.window is not None}
    found = ", ".join(
        f"{size} keys in layers {[n for n in sizes if sizes[n] == size]}" for size in sorted(set(sizes.values()))
    )
    whole = f"; a full n x n mask in layers {dense}" if dense else ""
    return (True if sizes else None), (found or "none") + whole


def _window(size: int | None) -> str:
    return "all keys" if size is None else f"{size} keys"


def _sinks(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Report the layers with learned sinks."""
    layers = [layer for layer, call in subject.probe.calls.items() if call.sinks is not None]
    return None, f"one per head in layers {layers}, part of each softmax denominator" if layers else "none"


def _softcap(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Report the soft-cap of the attention logits."""
    caps = sorted({call.softcap for call in subject.probe.calls.values() if call.softcap is not None})
    return None, f"logits are capped at {', '.join(map(str, caps))}" if caps else "none"


def _implementation(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Report the attention implementation, dtype and device."""
    name = getattr(subject.model.config, "_attn_implementation", None)
    return None, f"{name}, {str(compute_dtype(subject.model)).removeprefix('torch.')} on {input_device(subject.model)}"


def _tokenizer(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """The tokenizer gives character offsets, and its tokens fit the embedding of the model."""
    if subject.tokenizer is None:
        return None, "none given"
    if not getattr(subject.tokenizer, "is_fast", False):
        return (
            False,
            "it gives no character offsets; load a fast tokenizer, or give spans as token ids",
        )
    rows = subject.model.get_input_embeddings().weight.shape[0]
    if len(subject.tokenizer) > rows:
        return False, f"it has {len(subject.tokenizer)} tokens, but the model {rows}; load the tokenizer of this model"
    detail = f"{len(subject.tokenizer)} tokens, {'a' if subject.tokenizer.chat_template else 'no'} chat template"
    if last := last_tokens(subject.tokenizer):
        ends = "".join(subject.tokenizer.convert_ids_to_tokens(list(last)))
        detail += f"; it adds {ends!r} after a text, which prompts of interp leave out"
    return True, detail


def _bridge(subject: ModelUnderTest) -> tuple[bool | None, str]:
    """Report whether transformer-lens is installed."""
    if importlib.util.find_spec("transformer_lens") is None:
        return None, "transformer-lens is not installed; interp.bridge needs: pip install 'transformer-lens>=4.3,<5'"
    return True, "transformer-lens is installed"


CHECKS: dict[str, Check] = {
    "attention": _implementation,
    "seam": _seam,
    "heads": _heads,
    "idle": _idle,
    "reading": _reading,
    "rows": _rows,
    "padding": _padding,
    "generation": _generation,
    "windows": _windows,
    "learned sinks": _sinks,
    "soft-cap": _softcap,
    "tokenizer": _tokenizer,
    "bridge": _bridge,
}
