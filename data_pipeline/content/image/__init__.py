"""Images: from the bytes of a file to the model's input. Other packages import only from here.

    image_format(data)                 # by signature                             formats.py
    header = read_header(data)         # format and size; nothing is decoded      header.py
    check_pixels(header, max_pixels)   # rejects what takes too much memory       decoding.py
    eval_image(data, header, size)     # decode, center square, resize            transforms.py
    train_image(data, header, size, augment, uniforms)  # decode, augment         transforms.py

`train_image` selects a random region and orientation (`views.py`), decodes no more pixels than that
region needs (`decoding.py`), resamples once (`rendering.py`) and changes colors
(`color_jitter.py`). Its random numbers are those of the sample (`random_numbers.py`).
"""

from data_pipeline.content.image.color_jitter import color_jitter_enabled
from data_pipeline.content.image.decoding import check_pixels, decode_image, pillow_pixels
from data_pipeline.content.image.formats import check_supported, image_format
from data_pipeline.content.image.header import ImageHeader, read_header
from data_pipeline.content.image.random_numbers import uniform_numbers
from data_pipeline.content.image.rendering import composite
from data_pipeline.content.image.transforms import eval_image, eval_transform, train_image
from data_pipeline.content.image.views import NUM_GEOMETRY_UNIFORMS

__all__ = [
    "NUM_GEOMETRY_UNIFORMS",
    "ImageHeader",
    "check_pixels",
    "check_supported",
    "color_jitter_enabled",
    "composite",
    "decode_image",
    "eval_image",
    "eval_transform",
    "image_format",
    "pillow_pixels",
    "read_header",
    "train_image",
    "uniform_numbers",
]
