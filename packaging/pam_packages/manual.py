"""Manual pages, written from the commands' own help and from the tables of docs/operations.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

import click

from pam_packages.parts import ROOT, Part


def page(part: Part, command: click.Command, version: str, when: datetime) -> str:
    """The manual page of a program, in man(7)'s macros."""
    context = click.Context(command, info_name=part.package)
    lines = [
        f'.TH {part.package.upper()} {part.section} "{when:%Y-%m-%d}" "{part.package} {version}" "PAM"',
        ".SH NAME",
        f"{_escaped(part.package)} \\- {_escaped(command.get_short_help_str(70).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_escaped(part.package)}",
        _escaped(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_prose(command.help or ""),
        ".SH OPTIONS",
        *_options(command, context),
        ".SH COMMANDS",
        *_commands(command, context),
        *_configuration(part),
    ]
    if command.epilog:
        lines += [".SH NOTES", *_prose(command.epilog)]
    return "\n".join(lines) + "\n"


def _commands(command: click.Command, context: click.Context) -> Iterator[str]:
    if not isinstance(command, click.Group):
        return
    for name, child in sorted(command.commands.items()):
        inner = click.Context(child, info_name=name, parent=context)
        if isinstance(child, click.Group):
            yield from _commands(child, inner)
            continue
        yield f".SS {_escaped(inner.command_path)} {_escaped(' '.join(child.collect_usage_pieces(inner)))}"
        yield from _prose(child.help or "")
        yield from _options(child, inner)
        yield from _prose(child.epilog or "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield ".TP"
            yield f".B {_escaped(record[0])}"
            yield _escaped(record[1])


def _prose(text: str) -> Iterator[str]:
    """Paragraphs of a click help text; those after a backspace character keep their lines."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not paragraph.strip():
            continue
        yield ".PP"
        lines = paragraph.split("\n")
        if lines[0].strip() == "\b":
            yield ".nf"
            yield from (_escaped(line) for line in lines[1:])
            yield ".fi"
        else:
            yield from (_escaped(line.strip()) for line in lines)


def _configuration(part: Part) -> Iterator[str]:
    """The keys of the configuration file, as docs/operations.md has them."""
    text = (ROOT / "docs/operations.md").read_text()
    section = re.search(rf"^### {part.name}\.yml$(.*?)^##", text, re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit(f"error: docs/operations.md does not describe {part.name}.yml")
    yield ".SH CONFIGURATION"
    yield f".I /etc/{_escaped(part.package)}/{part.name}.yml"
    yield "is YAML. Unknown keys and wrong values are refused, all at once, with file and line."
    for row in re.findall(r"^\|(.+)\|$", section[1], re.MULTILINE):
        key, default, meaning = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        if not key.startswith("`"):
            continue  # the head of the table, and the rule below it
        yield ".TP"
        yield f".B {_escaped(_plain(key))}"
        yield _escaped(f"({_plain(default)}) {_plain(meaning)}" if default else _plain(meaning))


def _plain(markdown: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    return text.replace("`", "").replace("**", "").replace("\\|", "|")


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
