"""Markdown as far as a rulebook needs it: what is code or comment, and where headings and pictures stand.

CommonMark (https://spec.commonmark.org) decides, but for paths with spaces, which it refuses and people write,
and for indented code in list items, which people seldom mean. Tables are GitHub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent

from markdown_it import MarkdownIt
from markdown_it.token import Token

# of blocks alone; definitions stay text, as ours may hold paths with spaces
_PARSER = MarkdownIt("commonmark").enable("table").disable(["inline", "reference"])
_KINDS = {
    "paragraph_open": "text", "heading_open": "text", "tr_open": "row", "html_block": "html",
    "fence": "fence", "code_block": "indented",
}  # fmt: skip
_CODE = ("fence", "indented")
_SPAN_END = {"row": re.compile(r"(?<!\\)\|"), "html": re.compile("\n")}  # code in a cell stays in it

_BLANK = "\x01"  # stands in a masked text for a character that is no markup
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_MARK = re.compile(rf"(?P<escape>{_ESCAPE.pattern})|(?P<comment><!--)|(?P<ticks>`+)")
_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")

_GAP = r"[ \t]*\n?[ \t]*"
_TEXT = r"[^\[\]\n]|\n(?![ \t]*\n)"  # of a paragraph, without brackets
_TITLE = r"""(?:[ \t]+|[ \t]*\n[ \t]*)(?:"[^"]*"|'[^']*'|\([^()]*\))"""
_INLINE = rf"\({_GAP}(?:<(?P<angled>[^<>\n]*)>|(?P<plain>(?:[^()\n]|\([^()\n]*\))+?))(?:{_TITLE})?{_GAP}\)"
_IMAGE = re.compile(
    rf"!\[(?P<alt>(?:{_TEXT}|\[(?:{_TEXT})*\])*)\](?:{_INLINE}|\[(?P<label>(?:{_TEXT})*)\])?"
    r"""|<img\b(?P<html>(?:"[^"]*"|'[^']*'|[^'"<>])*)>"""
    r"|(?P<stray>!\[|<img\b)",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"""(?<![\w-])src\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'=<>`]+))""", re.IGNORECASE)
_DEFINITION = re.compile(
    rf"^ {{0,3}}\[(?P<label>(?!\^)(?:{_TEXT})+)\]:{_GAP}(?:<(?P<angled>[^<>\n]*)>|(?P<plain>[^\n]+?))"
    rf"(?:{_TITLE})?[ \t]*(?:\n|\Z)",
    re.MULTILINE,
)
_ATTRIBUTE = re.compile(r"<img\s+[\w-]+\s*=", re.IGNORECASE)
_WRITE = "write ![what it shows](path), or put it in backticks if it is no picture"


@dataclass(frozen=True)
class Cut:
    """A span of the text that gives way to the picture ``path``, or to nothing."""

    start: int
    stop: int
    path: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something at ``at`` that cannot be followed; ``wrong``: it is a picture that would be left out."""

    at: int
    what: str
    wrong: bool = True


def unescaped(text: str) -> str:
    """The text without the backslashes before punctuation."""
    return _ESCAPE.sub(r"\1", text)


def headings(text: str) -> Iterator[tuple[int, int, str]]:
    """(line index, level, text) of each heading, outside code and comments."""
    masked = _Masked(text).text.split("\n")
    for index, (line, shown) in enumerate(zip(text.split("\n"), masked, strict=True)):
        match = _HEADING.match(line)
        if match and _HEADING.match(shown):
            yield index, len(match[1]), match[2]


def pictures(text: str) -> tuple[list[Cut], list[Finding]]:
    """What of the text is not text: its pictures and comments, in order; and what looks like one and is none.

    Pictures are ``![alt](path)``, ``![alt][label]`` with its ``[label]: path``, and ``<img src="path">``; in
    code all is text. A definition that a picture uses is cut out, too.
    """
    masked = _Masked(text)
    definitions = {_label(text, m): m for m in reversed(list(_DEFINITION.finditer(masked.text)))}
    cuts, used = [Cut(*_whole_lines(text, *span)) for span in masked.comments], {}
    findings = list(masked.findings)
    for match in masked.images():
        path = _inline_path(text, match)
        if path is None and match["alt"] is not None and masked.text[match.end() : match.end() + 1] != "(":
            found = definitions.get(_label(text, match, "label" if match["label"] else "alt"))
            if found is not None:
                path = text[slice(*found.span("angled" if found["angled"] is not None else "plain"))]
                used[found.start()] = Cut(*found.span())
        if path:
            cuts.append(Cut(*match.span(), path))
        elif not (match["alt"] or "").startswith("^"):  # Really![^1] has a footnote
            findings.append(_leftover(text, match, masked.text))
    return _ordered([*cuts, *used.values()]), sorted(findings, key=lambda finding: finding.at)


@dataclass(frozen=True)
class _Block:
    """A run of whole lines: a paragraph, heading or what is between blocks ("text"), or one of ``_KINDS``."""

    kind: str
    start: int
    stop: int


class _Masked:
    """A text of the same length in which code, comments and escaped characters are blanked out.

    ``comments``: the spans of HTML comments. ``findings``: comments and code that never end, pictures that
    are indented code.
    """

    def __init__(self, text: str):
        self.comments: list[tuple[int, int]] = []
        self.findings: list[Finding] = []
        self.blocks = self._blocks(text)
        pieces = []
        for block in self.blocks:
            at = block.start
            while at < block.stop:
                mark = None if block.kind in _CODE else _MARK.search(text, at, block.stop)
                start = at if block.kind in _CODE else mark.start() if mark else block.stop
                stop = self._end(text, mark, block) if mark else block.stop
                pieces += [text[at:start], re.sub(r"[^\n]", _BLANK, text[start:stop])]
                at = stop
        self.text = "".join(pieces)

    def images(self) -> Iterator[re.Match]:
        """What looks like a picture, outside code and comments; none reaches from block to block."""
        for block in self.blocks:
            if block.kind not in _CODE:
                yield from _IMAGE.finditer(self.text, block.start, block.stop)

    def _blocks(self, text: str) -> list[_Block]:
        """The blocks that hold text or code, in order, and what is between them, from end to end."""
        starts = [0, *(m.end() for m in re.finditer("\n", text)), len(text)]
        out, line = [], 0
        for kind, first, last, token in _leaves(text.replace("\r", " ")):
            block = _Block(kind, starts[first], starts[last])
            out += [_Block("text", starts[line], block.start), block]
            line = last
            if kind == "fence" and token.content.count("\n") != last - first - 2:  # no line closes it
                self.findings.append(_unclosed(text, block, token.markup))
            elif kind == "indented":
                found = _IMAGE.finditer(text, block.start, block.stop)
                self.findings += [_indented(text, match) for match in found if _inline_path(text, match)]
        return [*out, _Block("text", starts[line], len(text))]

    def _end(self, text: str, mark: re.Match, block: _Block) -> int:
        """Where what ``mark`` begins ends; of lone backticks, they themselves."""
        if mark["comment"]:
            closing = text.find("-->", mark.start() + 2, block.stop)
            if closing < 0:
                self.findings.append(_open_comment(text, mark.start(), block))
                return mark.end()
            self.comments.append((mark.start(), closing + 3))
            return closing + 3
        if mark["ticks"]:
            run = mark["ticks"]
            limit = _SPAN_END[block.kind].search(text, mark.end(), block.stop) if block.kind in _SPAN_END else None
            stop = limit.start() if limit else block.stop
            end = re.compile(rf"(?<!`){run}(?!`)").search(text, mark.end(), stop)
            return mark.end() if end is None else end.end()
        return mark.end()


def _leaves(text: str, first: int = 0, listed: bool = False) -> Iterator[tuple[str, int, int, Token]]:
    """(kind, first line, line after the last, token) of each block that holds text or code.

    Within list items indentation is no code: what it indents is read as blocks.
    """
    depth = 0
    for token in _PARSER.parse(text if text.endswith("\n") else text + "\n"):
        if token.type in ("list_item_open", "list_item_close"):
            depth += token.nesting
        elif token.type == "code_block" and (listed or depth):
            yield from _leaves(dedent(token.content), first + token.map[0], listed=True)
        elif token.type in _KINDS:
            yield _KINDS[token.type], first + token.map[0], first + token.map[1], token


def _unclosed(text: str, block: _Block, run: str) -> Finding:
    code = "all that follows is code" if block.stop == len(text) else "all of its quote or list item is code"
    what = f"the code after {run} never ends, so {code}; write {run} after it"
    return Finding(text.index(run, block.start), what, wrong=False)


def _indented(text: str, match: re.Match) -> Finding:
    what = f"{_said(text, match)!r} is read as text, for the blanks before it make it code"
    return Finding(match.start(), f"{what}; write it at the start of its line if it is a picture", wrong=False)


def _open_comment(text: str, at: int, block: _Block) -> Finding:
    """A ``<!--`` without its ``-->``: a comment where a line begins with it, else prose."""
    if block.kind == "html" and text.find("<", block.start) == at:
        inside = "does not end in its quote or list item; write --> there"
        what = inside if "-->" in text[block.stop :] else "never ends; write --> after it"
        return Finding(at, f"the comment <!-- {what}")
    said = text[at : block.stop].split("\n")[0][:50].strip()
    what = f"{said!r} is read as text, for no --> ends it here; write one if it is a comment, or put it in backticks"
    return Finding(at, f"{what} if it is none", wrong=False)


def _inline_path(text: str, match: re.Match) -> str | None:
    for name in ("angled", "plain"):
        if match[name] is not None:
            return text[slice(*match.span(name))].strip()
    source = _SOURCE.search(match["html"] or "")
    return None if source is None else source[1] or source[2] or source[3]


def _label(text: str, match: re.Match, name: str = "label") -> str:
    return " ".join(text[slice(*match.span(name))].split()).casefold()


def _said(text: str, match: re.Match) -> str:
    return " ".join(text[match.start() : match.end() + 40].split("\n\n")[0].split())[:50]


def _leftover(text: str, match: re.Match, masked: str) -> Finding:
    """Why something that looks like a picture is none."""
    said = _said(text, match)
    if match["alt"] is None and match[0] != "![" and not _ATTRIBUTE.match(text, match.start()):  # prose has it, too
        what = f'{said!r} is read as text; write <img src="path">, or put it in backticks if it is no picture'
        return Finding(match.start(), what, wrong=False)
    if match["html"] is not None:
        return Finding(match.start(), f'{said!r} has no src="path"; give it one')
    if match["stray"] is not None:
        return Finding(match.start(), f"{said!r} looks like a picture, but does not end like one; {_WRITE}")
    if match["label"]:
        label = " ".join(text[slice(*match.span("label"))].split())
        return Finding(match.start(), f"{said!r} names a picture [{label}], but no line [{label}]: path says which")
    if masked[match.end() : match.end() + 1] == "(" or match["alt"].startswith("["):
        return Finding(match.start(), f"{said!r} looks like a picture, but is not written like one; {_WRITE}")
    return Finding(match.start(), f"{said!r} is read as text; {_WRITE}", wrong=False)


def _whole_lines(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span of a comment, with its lines where nothing else stands in them, and a blank one after it."""
    begin, end = text.rfind("\n", 0, start) + 1, text.find("\n", stop)
    end = len(text) if end < 0 else end + 1
    if text[begin:start].strip() or text[stop:end].strip():
        return start, stop
    apart = begin == 0 or text[:begin].endswith("\n\n")
    return begin, end + 1 if apart and text[end : end + 1] == "\n" else end


def _ordered(cuts: list[Cut]) -> list[Cut]:
    out: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: cut.start):
        if not out or cut.start >= out[-1].stop:
            out.append(cut)
        elif cut.stop > out[-1].stop:  # a comment's lines reach into those of the next
            out.append(Cut(out[-1].stop, cut.stop, cut.path))
    return out
