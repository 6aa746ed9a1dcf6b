"""Snapshots of a model's modules, to restore it after a library has rearranged them."""

from typing import Any

from torch import nn

LIBRARIES = ("transformers.", "transformer_lens.")
"""Libraries whose hooks are removed on restoring."""


class ModuleSnapshot:
    """The modules, parameters, buffers, attributes and configs of a model, recorded to be restored later.

    Restoring removes hooks that a library has added since the snapshot (transformers installs hooks once outputs are
    recorded, and notes that in an attribute). Hooks that anybody else has added are kept, and so are values that were
    changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, {k: _copy(v) for k, v in vars(m).items()}) for m in model.modules()]
        self.data = [(parameter, parameter.data) for parameter in model.parameters()]
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self.configs = [(config, dict(vars(config))) for config in configs.values()]

    def restore_configs(self) -> None:
        """Restore the entries of all configs."""
        for config, was in self.configs:
            _refill(vars(config), was)

    def restore(self) -> None:
        """Restore the modules, attributes, hooks, parameters and buffers."""
        for module, was in self.modules:
            now = vars(module)
            for name, value in was.items():
                if "hooks" in name and isinstance(value, dict):
                    _drop_library_hooks(now[name], value)
                elif isinstance(value, dict) and isinstance(now.get(name), dict):
                    _refill(now[name], value)
                elif now.get(name) is not value:
                    now[name] = value
            for name in now.keys() - was.keys():
                del now[name]
        for parameter, data in self.data:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data


def _drop_library_hooks(now: dict[int, Any], was: dict[int, Any]) -> None:
    """Remove the hooks of libraries that are new since the snapshot."""
    for number in [
        n for n in now.keys() - was.keys() if (getattr(now[n], "__module__", None) or "").startswith(LIBRARIES)
    ]:
        del now[number]


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _refill(now: dict[Any, Any], was: dict[Any, Any]) -> None:
    """Give a dict its former entries in their former order; the dict object stays the same."""
    now.clear()
    now.update(was)
