import pytest
from PIL import Image

from mpi_mlx.documents import PolicyDocument, from_parts, from_text, load_document, passages, place_document
from mpi_mlx.errors import DataError

RULES = """# Returns

Accept within 30 days.

![a torn box](pictures/torn%20box.png "torn")

## Damage

Refuse when the box looks like this: <img width=3 src="pictures/wet.png">. `![not](an.png)`

```
![nor](this.png)
# no heading
```

## Tone

Be brief.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures" / "torn box.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "pictures" / "wet.png")
    (tmp_path / "policy.md").write_text(RULES)
    return tmp_path


def test_images_become_parts_in_place(folder):
    document = load_document(folder)
    kinds = [p["type"] for p in document.parts]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert document.parts[0]["text"] == "# Returns\n\nAccept within 30 days.\n\n"
    assert document.images[0] == str((folder / "pictures" / "torn box.png").resolve())
    assert document.parts[4]["text"].startswith(". `![not](an.png)`")
    assert "![nor](this.png)" in document.text
    assert document.sections == ("Returns", "Damage", "Tone")
    assert document.name == folder.name


def test_hash_covers_text_image_bytes_and_order_only(folder, tmp_path_factory):
    import shutil

    first = load_document(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, moved)
    assert load_document(moved).sha256 == first.sha256
    assert load_document(moved / "policy.md").sha256 == first.sha256
    Image.new("RGB", (4, 4), "green").save(moved / "pictures" / "wet.png")
    assert load_document(moved).sha256 != first.sha256
    image = {"type": "image", "image": Image.new("RGB", (2, 2))}
    one, two = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    assert from_parts([one, image, two]).sha256 != from_parts([two, image, one]).sha256
    assert from_parts([one, two]).sha256 == from_text("ab", "another name").sha256


def test_a_folder_is_policy_md_or_all_files_in_order(tmp_path):
    (tmp_path / "2-tone.md").write_text("Be brief.")
    (tmp_path / "1-rules.md").write_text("Refund.\n")
    assert load_document(tmp_path).text == "Refund.\n\n\nBe brief."
    (tmp_path / "README.md").write_text("This too.")
    assert load_document(tmp_path).text == "Refund.\n\n\nBe brief.\n\nThis too."
    (tmp_path / "policy.md").write_text("Only this.")
    assert load_document(tmp_path).text == "Only this."


def test_amend_replaces_a_section_and_keeps_images(folder):
    document = load_document(folder)
    amended = document.amend("tone", "Be kind.")
    assert amended.text.endswith("## Tone\n\nBe kind.")
    assert amended.images == document.images and amended.sha256 != document.sha256
    without = document.amend("Damage", "Ask.\n\n![](pictures/wet.png)", folder=folder)
    assert without.images == document.images
    assert without.sections == ("Returns", "Damage", "Tone")
    assert "## Damage\n\nAsk.\n\n" in without.text and "looks like" not in without.text
    # A section of level one takes its subsections with it.
    assert document.amend("Returns", "None.").text == "# Returns\n\nNone."


def test_amend_appends_what_is_new():
    document = from_text("# A\n\none\n").amend("Shipping", "two")
    assert document.text == "# A\n\none\n\n## Shipping\n\ntwo"
    twice = from_text("## A\n\none\n\n## a\n\ntwo")
    with pytest.raises(DataError, match="2 sections are headed 'A'"):
        twice.amend("A", "three")


def test_markdown_round_trip(folder):
    document = load_document(folder)
    (folder / "again.md").write_text(document.to_markdown(["pictures/torn%20box.png", "pictures/wet.png"]))
    assert load_document(folder / "again.md").sha256 == document.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nok\n![x](gone.png)", r"policy\.md:3: image '.*gone\.png' does not exist"),
        ("![x](https://example.org/a.png)", r"policy\.md:1: .*not a local file; save it beside"),
        ("![x](broken.png)", r"policy\.md:1: image '.*broken\.png' cannot be read"),
        ("![x](notes.png)", r"policy\.md:1: .*not an image"),
        ("![x](phone.HEIC)", r"policy\.md:1: .*HEIC, as phones write it, is not read: save it as JPEG or PNG"),
        (" \n\n", "the document is empty"),
    ],
)
def test_bad_documents_name_file_and_line(tmp_path, text, message):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "notes.png").write_text("hello")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x1cftypheic" + bytes(400))
    (tmp_path / "policy.md").write_text(text)
    with pytest.raises(DataError, match=message):
        load_document(tmp_path)


def test_missing_empty_and_undecodable(tmp_path):
    with pytest.raises(DataError, match="no such document"):
        load_document(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no Markdown file"):
        load_document(tmp_path)
    (tmp_path / "policy.md").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        load_document(tmp_path)
    (tmp_path / "policy.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match="a document is a"):
        load_document(tmp_path / "policy.pdf")


def test_place_document_text_only_stays_a_string():
    document = from_text("Rules.")
    user = {"role": "user", "content": "Hi"}
    assert place_document([user], document) == [{"role": "system", "content": "Rules."}, user]
    messages = [{"role": "system", "content": "Be kind."}, user]
    assert place_document(messages, document)[0] == {"role": "system", "content": "Rules.\n\nBe kind."}
    assert messages[0]["content"] == "Be kind."
    assert place_document(messages, None) == messages


def test_place_document_with_images_is_a_list(folder):
    document = load_document(folder)
    system, user = place_document([{"role": "user", "content": "Hi"}], document)
    assert system["content"] == list(document.parts)
    assert user == {"role": "user", "content": "Hi"}
    joined, _ = place_document([{"role": "system", "content": "Be kind."}, user], document)
    assert joined["content"][-2:] == [{"type": "text", "text": "\n\n"}, {"type": "text", "text": "Be kind."}]


def test_passages_ask_for_each_section():
    text = "# Refunds\nWithin 30 days,\n\nwith a receipt.\n\n## Gold plan? Gold yes call.\n\n# Empty one\n\n## Next\nx "
    picture = Image.new("RGB", (4, 4))
    document = PolicyDocument.from_parts([{"type": "text", "text": text}, {"type": "image", "image": picture}])
    assert passages(document) == [
        ("Recall Refunds.", "Refunds Within 30 days, with a receipt."),
        ("Recall Gold.", "Gold plan? Gold yes call."),
        ("Recall Empty.", "Empty one"),
    ]
    assert passages(PolicyDocument.from_text("No headings here.")) == []
