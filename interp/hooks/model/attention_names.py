"""The attention implementation that a config names, replaced while contexts are open on a model."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from interp.errors import ModelError, UsageError
from interp.hooks.model.mask import ComputedMask, DeferredMask
from interp.hooks.model.row_ends import Generation
from interp.kernels.contract import Call, Rows
from interp.kernels.select import select

IMPLEMENTATION_NAME = "interp"
"""Name under which the functions are registered; transformers would treat a name with "flash" or "/" as a kernel."""


class BorrowedName(str):
    """The name that a config holds while it is patched. A copy of the config holds the original name."""

    original: str | None

    @classmethod
    def over(cls, original: str | None) -> "BorrowedName":
        """Make the name that replaces another."""
        name = cls(IMPLEMENTATION_NAME)
        name.original = original
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.original

    def __reduce_ex__(self, protocol: Any) -> Any:
        # loaded by functions that every Python has; without an original name, type(None)() is None
        return (type(None), ()) if self.original is None else (str, (self.original,))


class User(Protocol):
    """A seam that needs a config to be patched."""

    def acts_here(self) -> bool:
        """Whether it acts on calls of the running thread and task."""
        ...


@dataclass(eq=False)
class PatchedConfig:
    """A config that names interp's attention functions; several models may share one config."""

    config: Any
    originals: list[tuple[Any, str | None]] = field(default_factory=list)
    """The config and those inside it, each with the attention implementation to restore."""
    users: list[User] = field(default_factory=list)

    @property
    def names_interp(self) -> bool:
        """Whether the config still names interp's functions."""
        return self.config._attn_implementation == IMPLEMENTATION_NAME

    def borrow(self) -> None:
        """Make the config, and those inside it, name interp's functions."""
        self.originals = [(each, each._attn_implementation) for each in _with_inner(self.config)]
        self.config._attn_implementation = BorrowedName.over(self.originals[0][1])

    def give_back(self) -> None:
        """Restore the original names, except where the user has written another one since."""
        for each, original in self.originals:
            if each._attn_implementation == IMPLEMENTATION_NAME:
                each._attn_implementation_internal = original


_patched: dict[int, PatchedConfig] = {}
_undo: list[Callable[[], None]] = []
"""Functions that undo what was changed in transformers while any config is patched."""


def patch(
    config: Any,
    user: User,
    attend: Callable[..., Any],
    mask: Callable[..., Any],
    generation_of: Callable[[nn.Module], Generation | None],
) -> None:
    """Make a config name interp's functions, and register these on first use.

    Args:
        config: The config.
        user: The seam that needs it.
        attend: The attention function.
        mask: The mask function.
        generation_of: Function from a model to its generation, as `watch_generation` takes it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _patched:
        from interp.hooks.model.watched_criteria import watch_generation

        AttentionInterface.register(IMPLEMENTATION_NAME, attend)
        AttentionMaskInterface.register(IMPLEMENTATION_NAME, mask)
        _undo.extend((watch_generation(generation_of), _watch_implementation()))
    if id(config) not in _patched:
        _patched[id(config)] = PatchedConfig(config)
        _patched[id(config)].borrow()
    patched = _patched[id(config)]
    patched.users = [*patched.users, user]


def restore(config: Any, user: User) -> None:
    """Undo `patch` once the last user of the config is gone, and unregister the functions after the last config.

    An implementation that the user wrote into the config since is left there.

    Args:
        config: The config.
        user: The seam that no longer needs it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    patched = _patched.get(id(config))
    if patched is None:
        return
    patched.users = [other for other in patched.users if other is not user]
    if not patched.users:
        patched.give_back()
        del _patched[id(config)]
    if not _patched:
        for interface in (AttentionInterface, AttentionMaskInterface):
            # transformers has no public way to undo register()
            interface._global_mapping.pop(IMPLEMENTATION_NAME, None)
        while _undo:
            _undo.pop()()


def _watch_implementation() -> Callable[[], None]:
    """Let set_attn_implementation() change what a patched config falls back on; return a function that undoes it."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.set_attn_implementation

    @functools.wraps(original)
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        configs = {id(module.config) for module in self.modules() if hasattr(module, "config")}
        routed = [each for each in tuple(_patched.values()) if id(each.config) in configs and each.names_interp]
        for patched in routed:
            patched.give_back()
        try:
            original(self, *args, **kwargs)
        finally:
            for patched in routed:
                patched.borrow()

    def undo() -> None:
        PreTrainedModel.set_attn_implementation = original

    PreTrainedModel.set_attn_implementation = watched
    return undo


def _with_inner(config: Any) -> Iterator[Any]:
    """A config and the configs inside it, to which transformers passes an attention implementation on."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            yield from _with_inner(inner)


def original_implementation(config: Any) -> str | None:
    """The attention implementation that a config names, or named before it was patched."""
    found = _find(config)
    if found is not None:
        return found[1]
    # the context of another thread may have closed since this call began
    name = getattr(config, "_attn_implementation", None)
    return name.original if isinstance(name, BorrowedName) else name


def is_used_here(config: Any) -> bool:
    """Whether a context that patched the config acts on calls of the running thread and task."""
    found = _find(config)
    return found is not None and any(user.acts_here() for user in found[0].users)


def _find(config: Any) -> tuple[PatchedConfig, str | None] | None:
    """The patched config that a config is, or is inside of, and what it named before."""
    for patched in tuple(_patched.values()):
        for each, original in patched.originals:
            if each is config:
                return patched, original
    return None


def original_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Call the model's original attention function with the mask it would have received."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get(original_implementation(config))
    if function is None:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ModelError(
            f"{type(module).__name__} has no eager attention function to fall back on; "
            "load the model with attn_implementation='sdpa'."
        )
    whole = mask.facts_for(module).mask if isinstance(mask, DeferredMask) else mask
    whole = whole.plain if isinstance(whole, ComputedMask) else whole
    # accelerate moves the tensors of a layer to its device, and a deferred mask is none
    whole = whole if whole is None or whole.device == query.device else whole.to(query.device)
    return function(module, query, key, value, whole, **kw)


def returns_weights(module: nn.Module, kw: dict[str, Any], *, if_unknown: bool | None = None) -> bool:
    """Whether the caller collects attention weights, and the model's own function returns them.

    Args:
        module: The attention module.
        kw: The keyword arguments of its attention function.
        if_unknown: The answer where it is unknown whether the function returns weights; None raises an error.

    Raises:
        UsageError: If it is unknown whether the function returns weights, and no answer was given for this case.
    """
    config: Any = module.config
    if not (kw.get("output_attentions") or getattr(config, "output_attentions", False) or _collects()):
        return False
    name = original_implementation(config)
    if name in (None, "eager"):
        return True
    if name == "sdpa" or "flash" in str(name):
        return False
    if if_unknown is not None:
        return if_unknown
    raise UsageError(
        f"attentions are collected while a context edits {type(module).__name__}, and interp does not know what the "
        f"attention implementation {name!r} returns; load the model with attn_implementation='eager', or read "
        "keep.pattern()."
    )


def _collects() -> bool:
    """Whether a forward pass of transformers collects attentions; not every model passes this to its layers."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return True
    return any("attentions" in name for name in _active_collector.get() or ())


def weights_of(call: Call, n_keys: int) -> Tensor:
    """The attention weights `[b h q k]` of an edited call, over all keys of the cache, as an eager function returns."""
    rows = Rows(torch.arange(call.q.shape[2], device=call.q.device))
    weights = select(call, (rows,), "naive").engine(call, (rows,), None, out=False).values[0]
    return torch.nn.functional.pad(weights, (0, n_keys - weights.shape[-1])).to(call.q.dtype)


def ignores_softcap(module: nn.Module, kw: dict[str, Any]) -> bool:
    """Whether the original function lacks the soft-cap: older versions of sdpa ignore it, newer ones fail."""
    return kw.get("softcap") is not None and original_implementation(module.config) == "sdpa"


def needs_gradient(call: Call) -> bool:
    """Whether a backward pass will reach an operand of the call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in vars(call).values() if isinstance(x, Tensor))
