"""Settings of a config that may differ from layer to layer."""

from typing import Any


def values_of_layers(config: Any, name: str) -> list[Any]:
    """The values that the layers of a model have for a setting; None for a setting that there is not.

    Args:
        config: The config of a text model.
        name: The setting.

    Returns:
        One value if the config has one for all layers, or else one for each layer.

    Examples:
        >>> from interp.hooks.model.config_values import values_of_layers
        >>> values_of_layers(model.config, "num_attention_heads")
        [4]
    """
    # transformers raises an error where such a setting is read from the config itself
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(each, name, None) for each in config.per_layer_config]
    return [getattr(config, name, None)]


def largest_of_layers(config: Any, name: str) -> int | None:
    """The largest whole number that a layer has for a setting; None where there is none."""
    return max((value for value in values_of_layers(config, name) if isinstance(value, int)), default=None)
