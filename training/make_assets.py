"""Makes the files in src/purekv/reference/assets: atlas of shapes and glyphs, footage, photographs.

python training/make_assets.py atlas DejaVuSansMono-Bold.ttf
python training/make_assets.py footage BIG_BUCK_BUNNY.mp4
python training/make_assets.py footage2 palmtrees_loop_512.mp4
python training/make_assets.py photos FOLDER

FOLDER holds the files of PHOTOS; assets/ATTRIBUTION.md says where each comes from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from purekv.reference.render import ATLAS_GLYPH, ATLAS_SHAPE, GLYPHS_PER_ROW
from purekv.reference.scene import DIGITS, LETTERS, SHAPES

ASSETS = Path(__file__).parents[1] / "src/purekv/reference/assets"
GLYPHS = "".join(dict.fromkeys(LETTERS + DIGITS + "01"))
FOOTAGE = (640, 360)
FOOTAGE2, FOOTAGE2_FRAMES = (480, 270), 96
PHOTO = (480, 360)
# File and which part stays when it is cropped to PHOTO's shape: 0 the top or left, 1 the other end.
PHOTOS = {
    "astronaut.png": 0.15,
    "brick.png": 0.5,
    "burano_768x512.png": 0.5,
    "camera.png": 0.2,
    "chelsea.png": 0.5,
    "china.jpg": 0.25,
    "coffee.png": 0.5,
    "crimson.jpg": 0.5,
    "flower.jpg": 0.5,
    "gravel.png": 0.5,
    "hubble_deep_field.jpg": 0.5,
    "lillian_640x480.png": 0.5,
    "retina.jpg": 0.5,
    "rocket.jpg": 0.5,
    "seattle_1500x1000.png": 0.75,
}


def shape_mask(name: str, side: int) -> Image.Image:
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    last, mid = side - 1, side // 2
    third = side * 32 // 100
    match name:
        case "circle":
            draw.ellipse((0, 0, last, last), fill=255)
        case "square":
            inset = side // 16
            draw.rectangle((inset, inset, last - inset, last - inset), fill=255)
        case "triangle":
            draw.polygon([(mid, 0), (last, last - side // 16), (0, last - side // 16)], fill=255)
        case "star":
            points = []
            for k in range(10):
                radius, angle = side * (0.52 if k % 2 == 0 else 0.24), math.pi * (k / 5 - 0.5)
                points.append((mid + radius * math.cos(angle), mid + radius * math.sin(angle)))
            draw.polygon(points, fill=255)
        case "cross":
            draw.rectangle((third, 0, last - third, last), fill=255)
            draw.rectangle((0, third, last, last - third), fill=255)
        case "diamond":
            draw.polygon([(mid, 0), (last, mid), (mid, last), (0, mid)], fill=255)
        case "ring":
            draw.ellipse((0, 0, last, last), fill=255)
            hole = side * 27 // 100
            draw.ellipse((hole, hole, last - hole, last - hole), fill=0)
        case "heart":
            draw.ellipse((0, side // 16, mid + side // 32, mid + side // 8), fill=255)
            draw.ellipse((mid - side // 32, side // 16, last, mid + side // 8), fill=255)
            draw.polygon(
                [(3, side * 42 // 100), (last - 3, side * 42 // 100), (mid, last)], fill=255
            )
    return image


def outlined(mask: Image.Image) -> Image.Image:
    """0 outside, 128 on the outline, 255 inside."""
    inner = ImageChops.subtract(mask, ImageChops.invert(mask)).filter(ImageFilter.MinFilter(11))
    return Image.composite(Image.new("L", mask.size, 255), mask.point(lambda v: v and 128), inner)


def glyph_mask(font: ImageFont.FreeTypeFont, glyph: str, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = font.getbbox(glyph)
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), glyph, font=font, fill=255)
    return image.resize(size, Image.Resampling.BOX).point(lambda v: 255 if v >= 128 else 0)


def make_atlas(font_path: str) -> Image.Image:
    font = ImageFont.truetype(font_path, 200)
    width, height = ATLAS_GLYPH
    rows = -(-len(GLYPHS) // GLYPHS_PER_ROW)
    atlas = Image.new("L", (len(SHAPES) * ATLAS_SHAPE, ATLAS_SHAPE + rows * height))
    for k, name in enumerate(SHAPES):
        padded = Image.new("L", (ATLAS_SHAPE + 12, ATLAS_SHAPE + 12))
        padded.paste(shape_mask(name, ATLAS_SHAPE), (6, 6))
        atlas.paste(
            outlined(padded).crop((6, 6, ATLAS_SHAPE + 6, ATLAS_SHAPE + 6)), (k * ATLAS_SHAPE, 0)
        )
    for k, glyph in enumerate(GLYPHS):
        row, column = divmod(k, GLYPHS_PER_ROW)
        atlas.paste(
            glyph_mask(font, glyph, ATLAS_GLYPH), (column * width, ATLAS_SHAPE + row * height)
        )
    return atlas


def make_footage(source: str, target: Path) -> None:
    with av.open(source) as read, av.open(str(target), "w") as write:
        video = write.add_stream("libx264", rate=25)
        video.width, video.height = FOOTAGE
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "23", "preset": "veryslow", "threads": "1"}
        for frame in read.decode(video=0):
            write.mux(
                video.encode(frame.reformat(*FOOTAGE, format="yuv420p", interpolation="AREA"))
            )
        write.mux(video.encode())


def encode(images: Iterable[Image.Image], target: Path, rate: int, options: dict[str, str]) -> None:
    with av.open(str(target), "w") as write:
        video = None
        for number, image in enumerate(images):
            if video is None:
                video = write.add_stream("libx264", rate=rate)
                video.width, video.height = image.size
                video.pix_fmt = "yuv420p"
                video.options = {"preset": "veryslow", "threads": "1", **options}
            frame = av.VideoFrame.from_image(image).reformat(
                format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base = number, Fraction(1, rate)
            write.mux(video.encode(frame))
        write.mux(video.encode())


def make_footage2(source: str, target: Path) -> None:
    with av.open(source) as read:
        images = [frame.to_image() for frame in read.decode(video=0)][:FOOTAGE2_FRAMES]
    cut = (ImageOps.fit(image, FOOTAGE2, Image.Resampling.LANCZOS) for image in images)
    encode(cut, target, 30, {"qp": "31", "g": "48"})


def make_photos(folder: Path, target: Path) -> None:
    """One photograph a frame, each a keyframe: any can be decoded alone."""
    images = (
        ImageOps.fit(
            Image.open(folder / name).convert("RGB"),
            PHOTO,
            Image.Resampling.LANCZOS,
            centering=(keep, keep),
        )
        for name, keep in PHOTOS.items()
    )
    encode(images, target, 1, {"qp": "25", "g": "1"})


if __name__ == "__main__":
    what, source = sys.argv[1:]
    match what:
        case "atlas":
            make_atlas(source).save(ASSETS / "atlas.png", optimize=True)
        case "footage":
            make_footage(source, ASSETS / "footage.mp4")
        case "footage2":
            make_footage2(source, ASSETS / "footage2.mp4")
        case "photos":
            make_photos(Path(source), ASSETS / "photos.mp4")
        case _:
            sys.exit(__doc__)
