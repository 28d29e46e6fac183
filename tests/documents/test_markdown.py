"""What of a Markdown file is a picture, what is no part of the rulebook, and what must not be lost in silence."""

import pytest
from PIL import Image

from mpi_mlx.documents import load_document, passages, unread_files
from mpi_mlx.documents.load import PolicyDocument
from mpi_mlx.errors import DataError

NAMES = ("a.jpg", "box photo.jpg", "a (1).jpg", "a(1).jpg", "R&D.jpg", "50%20.jpg", "[1].jpg")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    return tmp_path


def load(folder, text):
    (folder / "policy.md").write_text(text)
    return load_document(folder)


def shown(folder, text):
    """The document as text, its pictures as [name]."""
    document = load(folder, text)
    assert not document.origin.warnings
    parts = [p["text"] if p["type"] == "text" else f"[{p['image'].rpartition('/')[2]}]" for p in document.parts]
    return "".join(parts)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("![box](box photo.jpg)", "[box photo.jpg]"),
        ("![box](<box photo.jpg>)", "[box photo.jpg]"),
        ("![box](box%20photo.jpg)", "[box photo.jpg]"),
        ('![box]( box photo.jpg "a title" )', "[box photo.jpg]"),
        ("![t](a.jpg (title))", "[a.jpg]"),
        ("![t](a.jpg 'it (is)')", "[a.jpg]"),
        ("![t](a (1).jpg)", "[a (1).jpg]"),
        ("![t](a(1).jpg)", "[a(1).jpg]"),
        (r"![t](a\(1\).jpg)", "[a(1).jpg]"),
        ("![t](50%20.jpg)", "[50%20.jpg]"),
        ("![a torn\nbox](a.jpg) b", "[a.jpg] b"),
        ("![a [torn] box](a.jpg)", "[a.jpg]"),
        (r"![a \] box](a.jpg)", "[a.jpg]"),
        ("![a `]` box](a.jpg)", "[a.jpg]"),
        ("![a](\n  a.jpg\n  'title'\n)", "[a.jpg]"),
        ("[![a](a.jpg)](https://example.org)", "[[a.jpg]](https://example.org)"),
        ("![](a.jpg)![](a.jpg)", "[a.jpg][a.jpg]"),
        ("<img\n alt='>' src=a.jpg>", "[a.jpg]"),
        ('<IMG data-src="x.jpg" SRC = "R&amp;D.jpg" />', "[R&D.jpg]"),
        ("![r][fig1] b\n\n[fig1]: a.jpg\n\nc", "[a.jpg] b\n\n\nc"),
        ("![r][Fig  1]\n\n[fig 1]: <box photo.jpg> 'title'", "[box photo.jpg]\n\n"),
        ("![fig1][] ![fig1]\n\n[fig1]: box photo.jpg", "[box photo.jpg] [box photo.jpg]\n\n"),
        ("[fig1]: a.jpg\n[fig1]: gone.jpg\n![r][fig1]", "[fig1]: gone.jpg\n[a.jpg]"),
        ("[rules][more]\n\n[more]: other.md", "[rules][more]\n\n[more]: other.md"),
        # no pictures
        (r"\![a](a.jpg)", r"\![a](a.jpg)"),
        ("`![a](gone.jpg)` ``![b](`gone.jpg)``", "`![a](gone.jpg)` ``![b](`gone.jpg)``"),
        ("`two\n![a](gone.jpg) lines`", "`two\n![a](gone.jpg) lines`"),
        ("5` long\n\n![a](a.jpg) 6` long", "5` long\n\n[a.jpg] 6` long"),
        ("```\n![a](gone.jpg)\n```\n![a](a.jpg)", "```\n![a](gone.jpg)\n```\n[a.jpg]"),
        ("~~~~\n~~~\n![a](gone.jpg)\n~~~~~\n![a](a.jpg)", "~~~~\n~~~\n![a](gone.jpg)\n~~~~~\n[a.jpg]"),
        ("- ```\n  ![a](gone.jpg)\n\n  ```\n- ![a](a.jpg)", "- ```\n  ![a](gone.jpg)\n\n  ```\n- [a.jpg]"),
        ("1.  Do\n\n    ```\n    ![a](gone.jpg)\n    ```\n", "1.  Do\n\n    ```\n    ![a](gone.jpg)\n    ```\n"),
        # code ends with its block
        ("- Press ` now.\n- See ![x](a.jpg)\n- Press ` again.", "- Press ` now.\n- See [a.jpg]\n- Press ` again."),
        ("A `b\n# ![x](a.jpg)\nc`", "A `b\n# [a.jpg]\nc`"),
        ("A `b\n> ![x](a.jpg) c`", "A `b\n> [a.jpg] c`"),
        ("A `b\n===\n![x](a.jpg) c`", "A `b\n===\n[a.jpg] c`"),
        ("A `b\n***\n![x](a.jpg) c`", "A `b\n***\n[a.jpg] c`"),
        ("A `b\n~~~\n![x](gone.jpg) c`\n~~~", "A `b\n~~~\n![x](gone.jpg) c`\n~~~"),
        ("|a|b|\n|-|-|\n|`|![x](a.jpg)|\n|`|`|", "|a|b|\n|-|-|\n|`|[a.jpg]|\n|`|`|"),
        ("|a|b|\n|-|-|\n|`|![x](a.jpg)`|", "|a|b|\n|-|-|\n|`|[a.jpg]`|"),
        (r"|`![x](gone.jpg)\|`|" + "\n|-|\n", r"|`![x](gone.jpg)\|`|" + "\n|-|\n"),
        ("> `a\n> ![x](gone.jpg)\n> b`", "> `a\n> ![x](gone.jpg)\n> b`"),
        # indented code, and what in list items is none
        ("Write this:\n\n    <!-- note -->\n    <b>x</b>", "Write this:\n\n    <!-- note -->\n    <b>x</b>"),
        ("Write this:\n\n\t<!-- note -->\n\n\t# x\n\nb", "Write this:\n\n\t<!-- note -->\n\n\t# x\n\nb"),
        ("> a\n>\n>     <!-- b -->", "> a\n>\n>     <!-- b -->"),
        ("a\n    ![x](a.jpg) <!-- b -->", "a\n    [a.jpg] "),
        ("- a\n\n    ![x](a.jpg)<!-- b -->", "- a\n\n    [a.jpg]"),
        ("- a\n\n          ![x](a.jpg)<!-- b -->", "- a\n\n          [a.jpg]"),
        (
            "- a `\n\n      ~~~\n      ![x](gone.jpg)\n\n      ~~~\n\n      ![x](a.jpg) `",
            "- a `\n\n      ~~~\n      ![x](gone.jpg)\n\n      ~~~\n\n      [a.jpg] `",
        ),
        ("Really![^1] so! [a](b)\n\n[^1]: Yes.", "Really![^1] so! [a](b)\n\n[^1]: Yes."),
        # comments are no part of it
        ("a <!-- b --> c", "a  c"),
        ("a\n<!-- b\n\n![x](gone.jpg)\n``` -->\nc", "a\nc"),
        ("a\n\n<!-- b -->\n\nc", "a\n\nc"),
        ("<!-- b -->\n# c", "# c"),
        ("a\n<!-- b -->", "a\n"),
        ("<!-- a --><!-- b -->\nc <!----> d <!--> e", "\nc  d  e"),
        ("`<!-- a -->`\n```\n<!-- b -->\n```\n\\<!-- c", "`<!-- a -->`\n```\n<!-- b -->\n```\n\\<!-- c"),
    ],
)
def test_pictures_and_comments(folder, written, read):
    assert shown(folder, written) == read


UNLIKE = "looks like a picture, but is not written like one"
WRITE = r"write !\[what it shows\]\(path\), or put it in backticks if it is no picture"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n![[a.jpg]]", rf"policy\.md:2: '!\[\[a.jpg\]\]' {UNLIKE}; {WRITE}$"),
        ("a ![x]() b", rf"policy\.md:1: '!\[x\]\(\) b' {UNLIKE}"),
        ("![x](a.jpg", rf"'!\[x\]\(a.jpg' {UNLIKE}"),
        ("![x](a.jpg\n\nb)", rf"'!\[x\]\(a.jpg' {UNLIKE}"),
        ("a\n\n![x\n\n](a.jpg)", r"policy\.md:3: '!\[x' looks like a picture, but does not end like one"),
        ("![r][fig 1]", r"md:1: '!\[r\]\[fig 1\]' names a picture \[fig 1\], but no line \[fig 1\]: path says which$"),
        ("```\n[f]: a.jpg\n```\n![r][f]", r"policy\.md:4: .* no line \[f\]: path"),
        ("<img alt='x'>", r"""policy\.md:1: "<img alt='x'>" has no src="path"; give it one$"""),
        ("<img src='a.jpg'", r"looks like a picture, but does not end like one"),
        ("a\n![x][f]\n\n[f]: gone.jpg", r"policy\.md:2: image '.*gone\.jpg' does not exist"),
        ("a\n<!-- c\n\nd", r"policy\.md:2: the comment <!-- never ends; write --> after it$"),
        ("a\n> - <!-- c\n\nd -->", r"policy\.md:2: the comment <!-- does not end in its quote or list item; write -->"),
        ("![x](" + "A" * 300 + ")", r"policy\.md:1: image '.*' ?.*if it is base64"),
        ("![x](HTTPS://example.org/a.jpg)", r"policy\.md:1: image .* is not a local file"),
    ],
)  # fmt: skip
def test_what_looks_like_a_picture_is_never_left_out_in_silence(folder, text, message):
    with pytest.raises(DataError, match=message) as caught:
        load(folder, text)
    assert "\n" not in str(caught.value)


def test_all_errors_of_all_files_come_at_once(folder):
    (folder / "1.md").write_text("![a](gone.jpg)\n![[a.jpg]]\n\n![b](lost.jpg)")
    (folder / "2.md").write_text("![c](away.jpg)")
    with pytest.raises(DataError) as caught:
        load_document(folder)
    lines = [line.removeprefix(f"{folder}/").partition(" ")[0] for line in str(caught.value).split("\n")]
    assert lines == ["1.md:1:", "1.md:2:", "1.md:4:", "2.md:1:"]


def test_a_cut_off_photo_is_named_with_its_line(folder):
    Image.effect_noise((256, 256), 90).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-4000])
    with pytest.raises(DataError, match=r"policy\.md:2: image '.*cut\.jpg' cannot be read \(.*truncated"):
        load(folder, "\n![a](cut.jpg)")


def test_doubts_are_warnings(folder):
    def doubts(text):
        return [said.partition("policy.md:")[2] for said in load(folder, text).origin.warnings]

    why = "is read as text; write ![what it shows](path), or put it in backticks if it is no picture"
    assert doubts("a\n![fig1] b") == [f"2: '![fig1] b' {why}"]
    never = "1: the code after ``` never ends, so all that follows is code; write ``` after it"
    assert doubts("```\na\n![a](a.jpg)") == [never]
    code = "is read as text, for the blanks before it make it code; write it at the start of its line if it is a "
    assert doubts("a\n\n    b ![x](a.jpg)") == [f"3: '![x](a.jpg)' {code}picture"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hi.\nDo not use <img> tags.", "2: '<img> tags.' is read as text; write <img src=\"path\">"),
        ("Write no <img/> or", "1: '<img/> or' is read as text"),
        ("The <img tag is out.", "1: '<img tag is out.' is read as text"),
        ("A --> B <!-- C", "1: '<!-- C' is read as text, for no --> ends it here"),
        ("A --> B <!-- C\n\n# More\n\nD --> E", "1: '<!-- C' is read as text, for no --> ends it here"),
        ("- A <!-- B\n- C --> D", "1: '<!-- B' is read as text, for no --> ends it here"),
    ],
)
def test_prose_that_looks_like_markup_is_text(folder, text, said):
    document = load(folder, text)
    assert document.text == text and document.sha256 == PolicyDocument.from_text(text).sha256
    (warning,) = document.origin.warnings
    assert warning.partition("policy.md:")[2].startswith(said) and "put it in backticks" in warning


@pytest.mark.parametrize(
    "code",
    [
        "> ```\n> ![x](gone.jpg)\n",
        "> ```\n> ![x](gone.jpg)",
        "- ~~~\n  ![x](gone.jpg)\n\n  b\n",
        "1. > ```\n   > ![x](gone.jpg)\n2. b",
    ],
)
def test_code_ends_with_its_quote_or_list_item(folder, code):
    text = f"{code}\n# Rule\n\nSee "
    document = load(folder, text + "![x](a.jpg)")
    assert document.text == text and len(document.images) == 1 and document.sections == ("Rule",)
    (warning,) = document.origin.warnings
    assert "policy.md:1: the code after " in warning and "all of its quote or list item is code" in warning


def test_headings_are_found_outside_code_and_comments(folder):
    text = "# A `b`\n\n<!--\n# no\n-->\n\n- ```\n  # no\n  ```\n\n## C #\nc"
    document = load(folder, text)
    assert document.sections == ("A `b`", "C")
    assert PolicyDocument.from_text(text).sections == ("A `b`", "C")
    assert passages(document)[-1] == ("Recall C.", "C c")
    assert document.amend("a `b`", "New.").text == "# A `b`\n\nNew."


def test_backticks_hide_no_heading():
    document = PolicyDocument.from_text("Don`t guess.\n# Refunds\nIt`s 30 days.\n# Tone\r\n`")
    assert document.sections == ("Refunds", "Tone")
    assert document.amend("refunds", "Now 14.").text == "Don`t guess.\n# Refunds\n\nNow 14.\n\n# Tone\r\n`"


def test_files_that_are_read_and_files_that_are_not(folder):
    for name in ("02-refunds.txt", "01-returns.md", "README.md", "10-more.markdown", "._01-returns.md", "old.pdf"):
        (folder / name).write_text(f"{name}\n")
    (folder / "old").mkdir()
    (folder / "old" / "rules.md").write_text("Old.")
    (folder / "01-returns.md").write_text("![](a.jpg)")
    document = load_document(folder)
    assert [f.name for f in document.origin.files] == [
        "01-returns.md", "02-refunds.txt", "10-more.markdown", "README.md",
    ]
    assert document.text == "\n\n02-refunds.txt\n\n\n10-more.markdown\n\n\nREADME.md\n"
    unused = sorted(name for name in NAMES if name != "a.jpg")
    assert [str(f) for f in unread_files(document)] == [*unused, "old.pdf", "old/rules.md"]
    (folder / "Policy.md").write_text("Only this.")
    document = load_document(folder)
    assert document.text == "Only this." and "README.md" in map(str, unread_files(document))
    assert unread_files(load_document(folder / "README.md")) == []
    assert unread_files(PolicyDocument.from_text("x")) == []
