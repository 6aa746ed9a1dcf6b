"""Putting a model back as it was, after something took its modules apart."""

from typing import Any

from torch import nn

LIBRARIES = ("transformers.", "transformer_lens.")


class ModuleSnapshot:
    """What a model is made of, noted to be put back: modules, parameters, buffers, attributes and configs.

    Hooks of a library that came meanwhile go (transformers installs its own once outputs are recorded, and notes that
    in an attribute); those of anybody else stay. Values changed in place stay changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, {k: _copy(v) for k, v in vars(m).items()}) for m in model.modules()]
        self.data = [(parameter, parameter.data) for parameter in model.parameters()]
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self.configs = [(config, dict(vars(config))) for config in configs.values()]

    def restore_configs(self) -> None:
        for config, was in self.configs:
            _refill(vars(config), was)

    def restore(self) -> None:
        for module, was in self.modules:
            now = vars(module)
            for name, value in was.items():
                if "hooks" in name and isinstance(value, dict):
                    _drop(now[name], value)
                elif isinstance(value, dict) and isinstance(now.get(name), dict):
                    _refill(now[name], value)
                elif now.get(name) is not value:
                    now[name] = value
            for name in now.keys() - was.keys():
                del now[name]
        for parameter, data in self.data:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data


def _drop(now: dict[int, Any], was: dict[int, Any]) -> None:
    for number in [
        n for n in now.keys() - was.keys() if (getattr(now[n], "__module__", None) or "").startswith(LIBRARIES)
    ]:
        del now[number]


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _refill(now: dict[Any, Any], was: dict[Any, Any]) -> None:
    """The entries of before in the order of before, in the same dict."""
    now.clear()
    now.update(was)
