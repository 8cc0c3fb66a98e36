"""What the documentation says, held against the code: commands and options, links, tables and their source."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parents[2]

SHELLS = {"bash", "console", "sh", "shell"}
_SEPARATORS = {"|", "||", "&", "&&", ";", "(", ")", ">", ">>", "<", "2>"}
_NUMBER = re.compile(
    r"[*~<>≈±+-]*\d[\d.,]*(e-?\d+)?\s?(%|[a-zµ]{1,5}(/s)?|[KMG]i?B|FPS|)?[*]*( ?[/±–-] ?[\d.,]+ ?%?)*", re.IGNORECASE
)
_SKIP = re.compile(r"<!--\s*test: skip\s+(?P<reason>\S.*?)\s*-->")
_NOT_MEASURED = re.compile(r"<!--\s*test: not measured:\s+(?P<reason>\S.*?)\s*-->")


@dataclass
class Snippet:
    """A piece of code: a fenced or indented block, or an inline span."""

    text: str
    line: int
    language: str = ""
    inline: bool = False
    skip: str | None = None


@dataclass
class Section:
    """What is between two headings."""

    title: str
    snippets: list[Snippet] = field(default_factory=list)
    tables: list[tuple[int, list[str], bool]] = field(default_factory=list)
    """Line, body cells, and whether a comment says that its numbers are no measurement."""
    links: list[tuple[int, str]] = field(default_factory=list)


def sections(text: str) -> list[Section]:
    """The sections of a Markdown document."""
    found = [Section("")]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    comment = ""
    line = 1
    cells: list[str] | None = None
    in_body = False
    for index, token in enumerate(tokens):
        if token.map:
            line = token.map[0] + 1
        here = found[-1]
        if token.type == "heading_open":
            found.append(Section(tokens[index + 1].content))
        elif token.type in ("fence", "code_block"):
            skip = _SKIP.search(comment)
            here.snippets.append(
                Snippet(token.content, line + (token.type == "fence"), token.info.strip(), skip=skip and skip["reason"])
            )
        elif token.type == "table_open":
            cells = []
            here.tables.append((line, cells, _NOT_MEASURED.search(comment) is not None))
        elif token.type in ("tbody_open", "tbody_close"):
            in_body = token.type == "tbody_open"
        elif token.type == "inline":
            if in_body and cells is not None:
                cells.append(token.content.strip())
            for child in token.children or []:
                if child.type == "code_inline":
                    here.snippets.append(Snippet(child.content, line, inline=True))
                elif child.type == "link_open":
                    here.links.append((line, str(child.attrGet("href"))))
        comment = token.content if token.type == "html_block" else ""
    return found


# --- commands ---


def commands(snippet: Snippet) -> Iterator[tuple[int, list[str]]]:
    """The commands of a snippet as argument lists, each with its line."""
    if not snippet.inline and snippet.language not in (SHELLS | {""}):
        return
    lines = snippet.text.replace("\\\n", " \n").split("\n")
    joined: list[tuple[int, str]] = []
    continued = False
    for number, text in enumerate(lines, snippet.line):
        # A usage line may go on with indented options in brackets.
        if joined and (continued or re.match(r"\s+\[--", text)):
            joined[-1] = (joined[-1][0], joined[-1][1] + " " + text.strip())
        else:
            joined.append((number, text.strip().removeprefix("$ ")))
        continued = snippet.text.split("\n")[number - snippet.line].endswith("\\")
    for number, text in joined:
        # Optional parts in brackets, choices with bars: fast|paper.
        usage = re.sub(r"\[(-[^\]]*)\]", lambda match: match[1].replace("|", ","), text)
        lexer = shlex.shlex(usage, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # prose with an apostrophe in an unmarked block
            continue
        part: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS:
                if part:
                    yield number, part
                part = []
            elif part or not re.fullmatch(r"[A-Z_]+=.*", word):
                part.append(word)


def is_ours(words: list[str]) -> bool:
    """Whether this is a command of this repository."""
    if words[0] == "make":
        return len(words) > 1
    return words[0] in _APPS or _script(words) is not None


def _script(words: list[str]) -> str | None:
    if words[0] in ("python", "python3") and len(words) > 1 and words[1].startswith("benchmarks/"):
        return None if "NAME" in words[1] else words[1]
    return None


_APPS = {
    "saae-run": "saae_runtime.cli.command",
    "saae-line": "saae_runtime.line.cli.command",
    "saae-train": "saae_train.cli.command",
    "saae-export": "saae_export.cli.command",
}


@functools.cache
def _command_of(name: str) -> Any:
    import typer

    if name in _APPS:
        return typer.main.get_command(importlib.import_module(_APPS[name]).app)
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    app = typer.Typer()
    app.command()(module.main)
    return typer.main.get_command(app)


def problem(words: list[str], whole: bool) -> str | None:
    """What is wrong with a command, or None.

    Args:
        words: the command.
        whole: whether it is meant to be typed as it is, so that required arguments must be there.
    """
    if words[0] == "make":
        return _make_problem(words[1:])
    if words[0] in ("pip", "pip3"):
        return _pip_problem(words)
    if words[0] in _APPS:
        name, arguments = words[0], words[1:]
    else:
        script = _script(words)
        if script is None:
            return None
        if not (ROOT / script).is_file():
            return f"there is no {script}"
        name, arguments = script, words[2:]
    if not arguments and not whole:
        return None
    return _arguments_problem(_command_of(name), name, arguments, whole)


def _arguments_problem(command: Any, name: str, arguments: list[str], whole: bool) -> str | None:
    # The command line's own parser, without running or converting anything.
    context = command.context_class(command, info_name=name)
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(arguments))
    except Exception as error:  # typer brings its own click, so that there is no one class to name
        return f"{name}: {getattr(error, 'message', None) or error}"
    if values.get("help"):
        return None
    if hasattr(command, "commands"):
        if not rest:
            given = any(values.get(parameter.name) for parameter in command.params)
            return None if given or not whole else f"{name}: a command is missing"
        if rest[0] not in command.commands:
            return f"{name} has no command {rest[0]}; it has {', '.join(command.commands)}"
        return _arguments_problem(command.commands[rest[0]], f"{name} {rest[0]}", rest[1:], whole)
    if rest:
        return f"{name}: {' '.join(rest)} is one argument too many"
    if whole:
        for parameter in command.params:
            if parameter.required and not values.get(parameter.name):
                return f"{name}: {parameter.name} is missing"
    return None


def _make_problem(words: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z][\w-]*)\s*:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        if not word.startswith("-") and "=" not in word and word not in targets:
            return f"make has no target {word}; it has {', '.join(sorted(targets))}"
    return None


def _pip_problem(words: list[str]) -> str | None:
    with (ROOT / "pyproject.toml").open("rb") as stream:
        known = set(tomllib.load(stream)["project"]["optional-dependencies"])
    for word in words:
        match = re.fullmatch(r"(?:saae|\.|[^\[]*saae[^\[]*)\[([^\]]+)\].*", word)
        for extra in match[1].split(",") if match else ():
            if extra.strip() not in known:
                return f"there is no extra {extra.strip()}; there are {', '.join(sorted(known))}"
    return None


def command_problems(text: str) -> list[str]:
    """Every documented command that does not exist as it is written, with its line."""
    found = []
    for section in sections(text):
        for snippet in section.snippets:
            usage = snippet.inline or "[" in snippet.text
            for line, words in commands(snippet):
                complaint = problem(words, whole=not usage)
                if complaint:
                    found.append(f"line {line}: {complaint}")
    return found


# --- tables and links ---


def table_problems(text: str) -> list[str]:
    """Tables of numbers in whose section no command says where they come from."""
    found = []
    for section in sections(text):
        named = any(is_ours(words) for snippet in section.snippets for _, words in commands(snippet))
        for line, cells, excused in section.tables:
            numbers = [cell for cell in cells if _NUMBER.fullmatch(cell)]
            if numbers and not named and not excused:
                found.append(
                    f"line {line}: a table of numbers ({numbers[0]}, ...) in '{section.title}' without the command"
                    " that makes it"
                )
    return found


def link_problems(text: str, folder: Path, within: Path | None = None) -> list[str]:
    """Relative links to a file or a heading that is not there.

    Args:
        text: the document.
        folder: the folder that it lies in.
        within: a folder that no link may leave, because the site holds nothing else; None: any link may.
    """
    found = []
    for section in sections(text):
        for line, link in section.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            path = (folder / target).resolve()
            if target and not path.exists():
                found.append(f"line {line}: {link} is not there")
            elif target and within is not None and not path.is_relative_to(within.resolve()):
                found.append(f"line {line}: {link} leaves {within.name}/, and so the site")
            elif anchor and (not target or path.suffix == ".md"):
                known = anchors(path.read_text(encoding="utf-8") if target else text)
                if anchor not in known:
                    found.append(f"line {line}: {link} has no such heading")
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings that a code host and the site spell alike."""
    found = set()
    for section in sections(text):
        title = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", section.title).lower()
        host = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
        found |= {host} & {site}
    return found


def python_blocks(text: str) -> list[Snippet]:
    """The Python blocks of a document, in their order."""
    return [snippet for part in sections(text) for snippet in part.snippets if snippet.language == "python"]
