"""Pictures as a viewer shows them, wherever they come in: examples and documents, models, requests."""

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mpi_mlx.documents import from_parts, load_document, open_image
from mpi_mlx.documents.images import as_seen, check_image, pixels
from mpi_mlx.errors import DataError
from mpi_mlx.models.images import ImageStore, Processed, load_image
from mpi_mlx.serving.limits import Limits
from mpi_mlx.serving.pictures import Pictures

RED, BLUE = (255, 0, 0), (0, 0, 255)


def served(path):
    kind = {".jpg": "jpeg", ".png": "png", ".gif": "gif"}[path.suffix]
    uri = f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()
    return Pictures(Limits()).load(uri, "here")


everywhere = pytest.mark.parametrize("read", [open_image, load_image, served])


def sideways(path, orientation=6):
    """84x56 as it is stored: red on the left, blue on the right."""
    picture = Image.new("RGB", (84, 56), RED)
    picture.paste(BLUE, (42, 0, 84, 56))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, quality=95, subsampling=0, exif=exif)
    return path


def near(pixel, color):
    return max(abs(a - b) for a, b in zip(pixel, color, strict=True)) < 12


@everywhere
def test_a_phone_s_photo_is_turned_upright(tmp_path, read):
    seen = read(sideways(tmp_path / "a.jpg"))
    assert seen.size == (56, 84) and seen.mode == "RGB"
    assert near(seen.getpixel((28, 10)), RED) and near(seen.getpixel((28, 74)), BLUE)
    assert as_seen(seen).size == (56, 84)  # once is enough
    assert read(sideways(tmp_path / "b.jpg", 1)).size == (84, 56)
    assert near(read(sideways(tmp_path / "c.jpg", 3)).getpixel((10, 28)), BLUE)


@everywhere
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_white(tmp_path, read, mode):
    """Black text on nothing stays black text; what shines through by half is half as bright."""
    options, path = {}, tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        black = (0,) * (len(mode) - 1)
        picture = Image.new(mode, (4, 1), (*black, 0))
        picture.putpixel((1, 0), (*black, 255))
        picture.putpixel((2, 0), (*black, 128))
    else:  # one colour of the picture stands for nothing
        picture = Image.new("RGB", (4, 1), (9, 9, 9))
        picture.putpixel((1, 0), (0, 0, 0))
        picture = picture.convert(mode) if mode != "P" else picture.quantize(2)
        nothing = picture.getpixel((0, 0))
        options = {"transparency": nothing}
    picture.save(path, **options)
    seen = read(path)
    assert seen.mode == "RGB"
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]
    if mode in ("RGBA", "LA"):
        assert seen.getpixel((2, 0)) == (127,) * 3  # 255 * (1 - 128 / 255)


@everywhere
def test_sixteen_bits_keep_their_upper_eight(tmp_path, read):
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert [read(tmp_path / "a.png").getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 128, 255]


def test_rare_modes():
    assert as_seen(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == RED
    assert as_seen(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255,) * 3
    assert as_seen(Image.new("I", (1, 1), 200)).getpixel((0, 0)) == (200,) * 3
    assert as_seen(Image.new("I", (1, 1), 65535)).getpixel((0, 0)) == (255,) * 3
    for mode in ("La", "LA", "PA", "RGBA", "RGBa"):
        assert as_seen(Image.new(mode, (1, 1))).getpixel((0, 0)) == (255,) * 3, mode


def test_a_broken_exif_block_is_no_reason_to_refuse_a_picture(tmp_path):
    for block in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert open_image(tmp_path / "a.jpg").size == (8, 4)


def test_plain_pictures_keep_their_bytes_and_documents_their_hash(tmp_path):
    """The hash of a document as it was before pictures were turned: it covers size and RGB bytes."""
    noise = Image.effect_noise((7, 5), 90).convert("RGB")
    noise.save(tmp_path / "a.png")
    for image in (noise, tmp_path / "a.png", noise.convert("RGBA")):
        assert pixels(image) == b"7 5 " + noise.tobytes()
    (tmp_path / "policy.md").write_text("# A\n\n![](a.png)")
    image = {"type": "image", "image": noise}
    assert load_document(tmp_path).sha256 == from_parts([{"type": "text", "text": "# A\n\n"}, image]).sha256
    red = from_parts([{"type": "image", "image": Image.new("RGB", (2, 2), RED)}])
    assert red.sha256 == "e18ed9d3b643686b0c73ed4e3b56e56d8e7d8f730938563f900ed53cdc2f4659"


def test_a_palette_is_part_of_a_picture_in_memory():
    """Two pictures of equal indices and other colours are two pictures."""
    store = ImageStore(lambda picture: Processed(np.asarray(picture, np.float32), None, 1))
    one, two = Image.new("P", (1, 1)), Image.new("P", (1, 1))
    one.putpalette(RED)
    two.putpalette(BLUE)
    assert [store.get(p).pixel_values[0, 0].tolist() for p in (one, two)] == [list(RED), list(BLUE)]


def bomb(path):
    """A PNG that says it has 20000 x 20000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)
    return path


def test_a_huge_picture_is_one_clear_line(tmp_path):
    file, why = bomb(tmp_path / "a.png"), r"cannot be read \(more than 178,956,970 pixels: scale it down\)"
    assert check_image(file) == f"image {str(file)!r} cannot be read (more than 178,956,970 pixels: scale it down)"
    for read in (open_image, load_image):
        with pytest.raises(DataError, match=why):
            read(file)


def test_what_is_no_path_is_one_clear_line(tmp_path):
    long = tmp_path / ("A" * 5000)
    said = check_image(long)
    assert said.startswith(f"image '{tmp_path}/AAA") and "AAAA'... (" in said and len(said) < 400
    assert said.endswith("is no path (File name too long); if it is base64, save it as a file and give its path")
    assert "does not exist" in check_image(tmp_path / "a\0b")
    with pytest.raises(DataError, match="is no path"):
        open_image(str(long))
    store = ImageStore(lambda picture: Processed(np.asarray(picture, np.float32), None, 1))
    for odd in (str(long), "a\0b"):
        with pytest.raises(DataError, match="does not exist; check the path in the example") as caught:
            store.get(odd)
        assert len(str(caught.value)) < 400
    said = check_image(tmp_path / ("/".join(["A" * 50] * 20)))
    assert "does not exist" in said and len(said) < 400
