"""Whole archives through a model: what `predict` and `embed` do between reading an image and writing a file.

failures     images that could not be read, told at the end
work         predict: the folder of half-finished work, its lock and its journal
rounds       predict: maps of all images, block by block, by one or several processes
block_file   predict: the answer for one block, on disk until its image is put together
classifying  predict: classes of all images, by one or several processes
formats      predict: which writer an image gets, and what that one wants to know
embedding    embed: vectors, token grids and their pictures of all images
"""

from __future__ import annotations

NAME_HEX = 16
"""Digits of an image's key that name its files: 64 bits, ample within one folder."""
