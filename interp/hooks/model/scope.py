"""The opening and closing of contexts on a model, and the thread and task whose calls a context acts on.

Every context that changes a module goes through `held`, `module_hooks` or `replaced_functions`. They keep these rules:

- A context acts on calls of the thread and task that opened it. Other calls run the model as it is.
- Compiled models run eagerly while a context is open, because compiled code skips hooks that were added later.
- Ctrl-C waits until a context is fully open or fully closed. A context that is dropped closes itself.
- Copies of a model carry nothing of the contexts that are open on it.
"""

import asyncio
import contextlib
import copy
import itertools
import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from interp.errors import ModelError, UsageError

_inherited: ContextVar[frozenset[int]] = ContextVar("interp_open_contexts", default=frozenset())
_all_open: dict[int, "Scope"] = {}
_numbers = itertools.count()


@dataclass(eq=False)
class Scope:
    """The thread and task that a context belongs to, and the layers that it has reached."""

    number: int = field(default_factory=lambda: next(_numbers))
    reached: set[int] = field(default_factory=set)
    """The layers on which the context has acted."""
    open: bool = False
    edited: bool = False
    """Whether the context has changed numbers of the model."""
    failed: bool = False
    """Whether a call on which the context acted ended with an error."""
    elsewhere: bool = False
    """Whether another thread or task ran the model while the context was open."""
    _thread: int = field(default_factory=threading.get_ident)
    _task: Any = field(default_factory=lambda: _current_task())

    def acts_here(self) -> bool:
        """Whether the context acts on calls of the running thread and task.

        Tasks and threads that copy the variables of their creator (`asyncio.create_task`, `asyncio.to_thread`) inherit
        the contexts that it has open. A context that was opened in a task which has ended, such as the cell of a
        notebook, belongs to its thread.
        """
        mine = self._is_mine()
        self.elsewhere = self.elsewhere or not mine
        return mine

    def _is_mine(self) -> bool:
        if self.number in _inherited.get():
            return True
        return threading.get_ident() == self._thread and (self._task is None or self._task.done())

    def check_reached(self, layers: Collection[int], name: str) -> None:
        """Refuse to end a context in silence that did not act on all of its layers.

        Args:
            layers: The layers that the context changes.
            name: Name of the context, for the message.

        Raises:
            ModelError: If no call of the model reached one of the layers.
        """
        missing = sorted(set(layers) - self.reached)
        if not missing or self.failed:
            return
        cause = (
            "another thread or task ran the model, and a context acts on the calls of its own alone"
            if self.elsewhere
            else "the model did not run inside the context, or ran as a copy, an exported graph or a CUDA graph"
        )
        raise ModelError(
            f"{name} changed nothing in layers {missing}: {cause}; run the model itself inside the context, in the "
            "thread that opens it."
        )


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


@contextlib.contextmanager
def inheriting(scopes: frozenset[int]) -> Iterator[None]:
    """Act for other open contexts, as in the thread of a backward pass that computes a layer again.

    Args:
        scopes: What `open_scopes` returned in the thread that opened the contexts.
    """
    token = _inherited.set(_inherited.get() | scopes)
    try:
        yield
    finally:
        _inherited.reset(token)


def open_scopes() -> frozenset[int]:
    """The numbers of the contexts that act on calls of the running thread and task."""
    return frozenset(scope.number for scope in tuple(_all_open.values()) if scope._is_mine())


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[Any] = []
    signal.signal(signal.SIGINT, lambda *details: arrived.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            handler(*arrived[0])


class _Steps:
    """Steps of opening and closing, of which one runs at a time in the process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._deferred: deque[Callable[[], None]] = deque()

    def run(self, step: Callable[[], None]) -> None:
        if getattr(self._inside, "step", False):
            # the garbage collector closes a context in the middle of another step
            self._deferred.append(step)
            return
        with uninterrupted():
            with self._lock:
                self._inside.step = True
                try:
                    step()
                finally:
                    self._inside.step = False
            while self._deferred:
                self.run(self._deferred.popleft())


_steps = _Steps()


class _Eager:
    """The stance of torch.compile while contexts are open: compiled code would skip their hooks."""

    def __init__(self) -> None:
        self._users: tuple[object, ...] = ()
        self._stance: Any = None

    def enter(self, user: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise _cannot_compile()
        if self._stance is None:
            try:
                self._stance = torch.compiler.set_stance("force_eager")
            except RuntimeError:
                raise _cannot_compile() from None
        self._users = (*self._users, user)

    def leave(self, user: object) -> None:
        self._users = tuple(other for other in self._users if other is not user)
        if not self._users and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_eager = _Eager()


@contextlib.contextmanager
def held(enter: Callable[[], None], leave: Callable[[], None], scope: Scope) -> Iterator[None]:
    """Open a context by one step and close it by another, which Ctrl-C and other threads interrupt in neither.

    Args:
        enter: Function that opens it.
        leave: Function that closes it, however much `enter` has done, and that may be called twice.
        scope: The thread and task to which the context belongs.
    """
    user, done = object(), []

    def start() -> None:
        _eager.enter(user)
        scope.open = True
        enter()
        _inherited.set(_inherited.get() | {scope.number})
        _all_open[scope.number] = scope

    def end() -> None:
        _inherited.set(_inherited.get() - {scope.number})
        _all_open.pop(scope.number, None)
        scope.open = False
        try:
            leave()
        finally:
            _eager.leave(user)
        done.append(True)

    try:
        try:
            _steps.run(start)
            yield
        finally:
            _steps.run(end)
    finally:
        # Ctrl-C may have come before the step began
        if not done:
            _steps.run(end)


@dataclass(eq=False)
class ModuleHook:
    """A function that runs before or after a module, on the calls that its context acts on.

    A copy of the module does not get it.
    """

    module: nn.Module
    function: Callable[..., Any]
    """Called as a hook of torch is; with_kwargs for the ones before."""
    after: bool = False
    with_kwargs: bool = False
    prepend: bool = False
    always_call: bool = False
    layer: int | None = None
    """The layer that counts as reached when it runs."""
    scope: Scope | None = None

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if module is not self.module or self.scope is None or not self.scope.acts_here():
            return None
        if self.layer is not None:
            self.scope.reached.add(self.layer)
        try:
            result = self.function(module, *arguments)
        except BaseException:
            self.scope.failed = True
            raise
        self.scope.edited = self.scope.edited or result is not None
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _do_nothing

    def __reduce__(self) -> Any:
        if self.after or self.with_kwargs:
            raise _cannot_save()
        # a function that every Python has: called with a module and its arguments, it returns the arguments
        return getattr, ({}, "get")


def _do_nothing(*_: Any, **__: Any) -> None:
    """The hook of a copied module."""


def _cannot_compile() -> UsageError:
    return UsageError(
        "a context of interp was opened inside a function that torch.compile compiles; open the context around the "
        "call of the compiled function, which then runs eagerly."
    )


def _cannot_save() -> UsageError:
    return UsageError("a context of interp that changes how this model runs is open; close it before saving the model.")


@contextlib.contextmanager
def module_hooks(hooks: Iterable[ModuleHook], scope: Scope | None = None) -> Iterator[Scope]:
    """Attach hooks to modules while the context is open.

    Args:
        hooks: The hooks, attached in this order.
        scope: The scope of the context; made here by default.

    Yields:
        Scope: The scope of the context.
    """
    hooks, scope = list(hooks), Scope() if scope is None else scope
    handles: list[Any] = []

    def enter() -> None:
        for hook in hooks:
            hook.scope = scope
            if hook.after:
                handle = hook.module.register_forward_hook(
                    hook, prepend=hook.prepend, with_kwargs=hook.with_kwargs, always_call=hook.always_call
                )
            else:
                handle = hook.module.register_forward_pre_hook(hook, prepend=hook.prepend, with_kwargs=hook.with_kwargs)
            handles.append(handle)

    def leave() -> None:
        for handle in handles:
            handle.remove()

    with held(enter, leave, scope):
        yield scope


@dataclass(eq=False)
class _Replacement:
    """A function that replaces one of a module, on the calls that its context acts on."""

    module: nn.Module
    name: str
    function: Callable[..., Any]
    original: Callable[..., Any]
    before: Any
    """The entry of the module's dictionary that it replaces; None if there is none."""
    scope: Scope
    open: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        acts = self.open and self.scope.acts_here()
        return (self.function if acts else self.original)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        twin = memo.get(id(self.module))
        method = getattr(type(twin), self.name, None)
        if twin is None or method is None:
            return copy.deepcopy(self.before, memo)
        return MethodType(method, twin)

    def __reduce__(self) -> Any:
        raise _cannot_save()


@contextlib.contextmanager
def replaced_functions(
    functions: Mapping[nn.Module, Callable[..., Any]], name: str = "forward", scope: Scope | None = None
) -> Iterator[Scope]:
    """Run other functions in place of the forward methods of modules while the context is open.

    Args:
        functions: By module, the function.
        name: Name of the attribute that holds the function.
        scope: The scope of the context; made here by default.

    Yields:
        Scope: The scope of the context.
    """
    replaced: list[_Replacement] = []
    scope = Scope() if scope is None else scope

    def enter() -> None:
        for module, function in functions.items():
            old = module.__dict__.get(name)
            replaced.append(_Replacement(module, name, function, getattr(module, name), old, scope))
            module.__dict__[name] = replaced[-1]

    def leave() -> None:
        for each in replaced:
            each.open = False
            here = each.module.__dict__
            # contexts of several threads may close in any order
            while isinstance(there := here.get(name), _Replacement) and not there.open:
                if there.before is None:
                    del here[name]
                else:
                    here[name] = there.before

    with held(enter, leave, scope):
        yield scope
