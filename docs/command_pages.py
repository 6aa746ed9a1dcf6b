"""The tables of options of the command line, from the application itself."""

from typing import Any

import typer.main

from interp import cli


def commands() -> str:
    """Every command with its options."""
    group: Any = typer.main.get_command(cli.app)
    parts = []
    for name, command in group.commands.items():
        arguments = [_metavar(param) for param in command.params if param.param_type_name == "argument"]
        usage = f"```text\n{' '.join(['interp', name, *arguments, '[OPTIONS]'])}\n```"
        rows = ["| option | meaning | default |", "|---|---|---|", *map(_row, command.params)]
        parts += [f"## interp {name}", " ".join(command.help.split()), usage, "\n".join(rows)]
    return "\n\n".join(parts)


def _metavar(param: Any) -> str:
    return param.metavar or param.name.upper()


def _row(param: Any) -> str:
    """One argument or option as a row of its command's table."""
    flags = [_metavar(param)] if param.param_type_name == "argument" else [*param.opts, *param.secondary_opts]
    names = ", ".join(f"`{flag}`{{.flag}}" for flag in flags).replace("|", "\\|")
    no_default = param.default in (None, False, "") or callable(param.default)
    value = "required" if param.required else "" if no_default else f"`{param.default}`"
    return f"| {names} | {param.help or ''} | {value} |"
