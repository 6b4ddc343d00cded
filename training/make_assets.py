"""Makes the files in src/purekv/reference/assets: the atlas of shapes and glyphs, the footage.

python training/make_assets.py BIG_BUCK_BUNNY.mp4 DejaVuSansMono-Bold.ttf
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import av
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from purekv.reference.render import ATLAS_GLYPH, ATLAS_SHAPE, GLYPHS_PER_ROW
from purekv.reference.scene import GLYPHS, SHAPES

ASSETS = Path(__file__).parents[1] / "src/purekv/reference/assets"
FOOTAGE = (640, 360)


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


if __name__ == "__main__":
    make_atlas(sys.argv[2]).save(ASSETS / "atlas.png", optimize=True)
    make_footage(sys.argv[1], ASSETS / "footage.mp4")
