import base64
import io
import os

import pytest
from PIL import Image

from mpi_mlx.serving.limits import Limits, Refused
from mpi_mlx.serving.pictures import Pictures
from mpi_mlx.serving.remote import RemoteImages


def data_uri(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def load(url, **limits):
    return Pictures(Limits(**limits)).load(url, "here")


@pytest.fixture
def folder(tmp_path):
    """An allowed folder with a picture, a folder below, and secrets beside it."""
    allowed = tmp_path / "allowed"
    (allowed / "below").mkdir(parents=True)
    for place in (allowed / "a b.png", allowed / "below" / "x.png", tmp_path / "secret.png"):
        Image.new("RGB", (3, 2), "blue").save(place)
    (tmp_path / "allowed-too").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "allowed-too" / "x.png")
    return allowed


def test_data_uris_of_every_format():
    red = Image.new("RGB", (4, 6), (250, 0, 0))
    for kind in ("PNG", "GIF", "BMP", "WEBP", "JPEG"):
        found = load(data_uri(red, kind))
        assert found.size == (4, 6) and found.mode == "RGB" and found.getpixel((1, 1))[0] > 240
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        assert load(data_uri(Image.new(mode, (2, 2)))).mode == "RGB"
    tiff = data_uri(red, "TIFF")
    for url in (tiff, "data:image/png;base64,AAAA", "data:image/png;base64,%%", "data:,x", "data:", "", "x.png",
                "/etc/passwd", "file:///etc/passwd", "http://localhost/x.png", "https://images.example/x.png",
                data_uri(red)[:-40], "javascript:1"):  # fmt: skip
        with pytest.raises(Refused, match="here: "):
            load(url)


def test_pixels_and_images_are_bounded_before_they_are_decoded(monkeypatch):
    def decoded(self, mode=None):
        raise AssertionError("decoded")

    large = data_uri(Image.new("1", (5000, 5000)))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", decoded)
        with pytest.raises(Refused, match="5000 x 5000 pixels; at most 16,777,216"):
            load(large)
    pictures = Pictures(Limits(request_pixels=250, images=3))
    small = data_uri(Image.new("RGB", (10, 10)))
    pictures.load(small, "one")
    pictures.load(small, "two")
    assert pictures.pixels == 200
    with pytest.raises(Refused, match="three: all images together have at most 250 pixels"):
        pictures.load(small, "three")
    with pytest.raises(Refused, match="four: at most 3 images"):
        pictures.load(small, "four")


def test_files_of_the_allowed_folder(folder):
    (folder / "inside.png").symlink_to(folder / "below" / "x.png")
    (folder / "door").symlink_to(folder / "below")
    for path in ("a b.png", "below/x.png", "inside.png", "door/x.png", "below/../a b.png"):
        assert load((folder / path).as_uri(), image_folder=folder).size == (3, 2), path
    assert load(f"file://localhost{folder}/below/x.png", image_folder=folder).size == (3, 2)
    with pytest.raises(Refused, match="data URIs only"):
        load((folder / "below/x.png").as_uri())


def test_no_path_escapes_the_folder(folder, tmp_path):
    outside = folder.parent / "secret.png"
    (folder / "link.png").symlink_to(outside)
    (folder / "relative.png").symlink_to("../secret.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "chain.png").symlink_to(folder / "up" / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "note.txt").write_text("text")
    attempts = [
        outside.as_uri(), f"file://{folder}/../secret.png", f"file://{folder}/%2e%2e/secret.png",
        f"file://{folder}/..%2fsecret.png", f"file://{folder}/below/../../secret.png",
        f"file://{folder}-too/x.png", f"file://{folder}/link.png", f"file://{folder}/relative.png",
        f"file://{folder}/up/secret.png", f"file://{folder}/chain.png", f"file://{folder}/loop.png",
        f"file://{folder}/gone.png", f"file://{folder}/pipe.png", f"file://{folder}/note.txt", f"file://{folder}",
        f"file://{folder}/below", f"file://{folder}/%00.png", "file:///dev/zero", "file:///proc/self/environ",
        f"file://other.example{folder}/below/x.png", "file://", "file:///", "file:a b.png", "FILE:///etc/passwd",
        str(folder / "a b.png"), "a b.png",
    ]  # fmt: skip
    for url in attempts:
        with pytest.raises(Refused):
            load(url, image_folder=folder)


def test_a_link_put_in_place_after_the_check_leads_nowhere(folder, monkeypatch):
    from mpi_mlx.serving import pictures

    really = pictures._open_below

    def swapped(root, steps):
        (folder / "below" / "x.png").unlink()
        (folder / "below" / "x.png").symlink_to(folder.parent / "secret.png")
        return really(root, steps)

    monkeypatch.setattr(pictures, "_open_below", swapped)
    with pytest.raises(Refused, match="no such picture"):
        load((folder / "below" / "x.png").as_uri(), image_folder=folder)


def test_fetched_images_share_one_deadline():
    ends = []

    class Fake(RemoteImages):
        def fetch(self, url, until=None):
            ends.append(until)
            file = io.BytesIO()
            Image.new("RGB", (5, 5)).save(file, "PNG")
            return file.getvalue()

    pictures = Pictures(Limits(remote_images=Fake(frozenset())))
    assert pictures.load("https://images.example/x.png", "a").size == (5, 5)
    pictures.load("HTTP://images.example/x.png", "b")
    assert ends[0] == ends[1] is not None
    with pytest.raises(Refused, match="data URIs, or from the allowed hosts"):
        pictures.load("ftp://images.example/x", "c")


def test_data_uris_in_lines():
    uri = data_uri(Image.effect_noise((40, 30), 50))
    head, _, data = uri.partition(",")
    lines = base64.encodebytes(base64.b64decode(data)).decode()
    assert lines.count("\n") > 5 and load(f"{head},{lines}").tobytes() == load(uri).tobytes()
