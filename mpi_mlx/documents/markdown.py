"""Markdown as far as a rulebook needs it: what is code or comment, and where headings and pictures stand.

CommonMark (https://spec.commonmark.org) decides, but for paths with spaces, which it refuses and people write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_BLANK = "\x01"  # stands in a masked text for a character that is no markup
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_QUOTED = r"^[ \t]*(?:(?:>|[-*+][ \t]|\d{1,9}[.)][ \t])[ \t]*)*"  # what may stand before a fence in its line
_MARK = re.compile(
    rf"(?P<escape>{_ESCAPE.pattern})|(?P<fence>{_QUOTED}(?P<run>`{{3,}}(?=[^`\n]*$)|~{{3,}}).*$)"
    r"|(?P<comment><!--)|(?P<ticks>`+)",
    re.MULTILINE,
)
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
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
    for match in _IMAGE.finditer(masked.text):
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


class _Masked:
    """A text of the same length in which code, comments and escaped characters are blanked out.

    ``comments``: the spans of HTML comments. ``findings``: comments and code that never end.
    """

    def __init__(self, text: str):
        self.comments: list[tuple[int, int]] = []
        self.findings: list[Finding] = []
        pieces, at = [], 0
        while (mark := _MARK.search(text, at)) is not None:
            stop = self._end(text, mark)
            pieces += [text[at : mark.start()], re.sub(r"[^\n]", _BLANK, text[mark.start() : stop])]
            at = stop
        self.text = "".join([*pieces, text[at:]])

    def _end(self, text: str, mark: re.Match) -> int:
        """Where what ``mark`` begins ends; of lone backticks, they themselves."""
        if mark["comment"]:
            closing = text.find("-->", mark.start() + 2)
            if closing < 0:
                self.findings.append(Finding(mark.start(), "the comment <!-- never ends; write --> after it"))
                return mark.end()
            self.comments.append((mark.start(), closing + 3))
            return closing + 3
        if mark["fence"]:
            run = mark["run"]
            end = re.compile(rf"^[ \t>]*{run[0]}{{{len(run)},}}[ \t]*$", re.MULTILINE).search(text, mark.end())
            if end is None:
                what = f"the code after {run} never ends, so all that follows is code; write {run} after it"
                self.findings.append(Finding(mark.start("run"), what, wrong=False))
            return len(text) if end is None else end.end()
        if mark["ticks"]:
            run = mark["ticks"]
            end = re.compile(rf"(?<!`){run}(?!`)").search(text, mark.end())
            if end is not None and not _PARAGRAPH_END.search(text, mark.end(), end.start()):
                return end.end()
        return mark.end()


def _inline_path(text: str, match: re.Match) -> str | None:
    for name in ("angled", "plain"):
        if match[name] is not None:
            return text[slice(*match.span(name))].strip()
    source = _SOURCE.search(match["html"] or "")
    return None if source is None else source[1] or source[2] or source[3]


def _label(text: str, match: re.Match, name: str = "label") -> str:
    return " ".join(text[slice(*match.span(name))].split()).casefold()


def _leftover(text: str, match: re.Match, masked: str) -> Finding:
    """Why something that looks like a picture is none."""
    said = " ".join(text[match.start() : match.end() + 40].split("\n\n")[0].split())[:50]
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
