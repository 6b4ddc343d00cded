from pathlib import Path

import pytest
from PIL import Image

from purekv.errors import PureKVError
from purekv.media import read_image


def test_any_mode_becomes_rgb(tmp_path: Path) -> None:
    Image.new("LA", (20, 10)).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("case", ["missing", "directory", "empty", "text", "truncated"])
def test_bad_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.png"
    if case == "directory":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("hello" * 99)
    elif case == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PureKVError) as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
