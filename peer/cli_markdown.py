"""docs/cli.md, made from the commands themselves, so that it cannot say anything else than `--help`."""

from __future__ import annotations

import inspect

import click

from peer.cli_output import EXIT_CODES

__all__ = ["markdown"]

_HEAD = """# The command line

Made by `ichiba --help-all-markdown > docs/cli.md`: change the commands, not this file.

Every command takes `--data DIR` (else `ICHIBA_DATA`, else the usual place of the system) and `--json`: then it prints
one JSON object per line, each with a `schema` field, and errors on stderr as an object with `code`, `what`, `why`,
`next` and `exit_code`. Amounts are credits (1 credit = 1,000,000 micro-credits); in JSON, fields ending in `_micro`
are micro-credits. Ctrl-C in `submit` and `job logs -f` detaches and never cancels.
"""


def markdown(root: click.Command) -> str:
    """The whole reference as Markdown."""
    parts = [_HEAD, "## Exit codes\n", "| code | meaning |\n| ---: | --- |"]
    parts.append("\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()) + "\n")
    parts += _command(root, click.Context(root, info_name="ichiba"))
    return "\n".join(parts).rstrip() + "\n"


def _command(command: click.Command, ctx: click.Context) -> list[str]:
    parts = [f"## {ctx.command_path}\n", f"`{' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)])}`\n"]
    parts.append(_text(command.help or ""))
    options = [_option(param, ctx) for param in command.params if isinstance(param, click.Option) and not param.hidden]
    own = [row for row in options if row]
    if own:
        parts.append("| option | meaning |\n| --- | --- |\n" + "\n".join(own) + "\n")
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            if inner is not None and not inner.hidden:
                parts += _command(inner, click.Context(inner, info_name=name, parent=ctx))
    return parts


def _option(option: click.Option, ctx: click.Context) -> str:
    """A row of the table; empty for what every command has."""
    if option.name in ("data", "as_json") and ctx.parent is not None:
        return ""
    record = option.get_help_record(ctx)
    if record is None:
        return ""
    names, text = (part.replace("|", "\\|") for part in record)
    return f"| `{names}` | {' '.join(text.split())} |"


def _text(text: str) -> str:
    """A docstring as Markdown: click's no-wrap mark \\b begins a block of examples."""
    blocks = []
    for block in inspect.cleandoc(text).split("\n\n"):
        if block.startswith("\b"):
            blocks.append("```console\n" + inspect.cleandoc(block[1:]) + "\n```")
        else:
            blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks) + "\n"
