"""Values that travel between processes as text and buffers: exact, and nothing in them can run or import code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomed_mae.image import Channel, VolumeGeometry
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source
from geomed_mae.readers.wire import INLINE_VALUES, pack, unpack

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_a_value_comes_back_as_it_went(value):
    again = unpack(pack(value))
    assert again == value and type(again) is type(value)


def test_text_is_ascii_whatever_it_holds():
    name = Path("caf\u00e9\n\x1b[31m" + b"\xff".decode("utf-8", "surrogateescape"))
    assert pack(name).isascii() and unpack(pack(name)) == name


def test_what_is_not_a_number_stays_so():
    nan, infinite = unpack(pack((math.nan, -math.inf)))
    assert math.isnan(nan) and infinite == -math.inf


def test_a_refusal_and_a_source_come_back_equal():
    refusal = Refusal(Path("a"), Reason.TOO_LARGE, "big")
    assert unpack(pack(refusal)) == refusal
    source = Source(
        reader="dicom",
        files=(Path("a"), Path("b")),
        selector={"frames": [0, 1], "nodata": math.inf, "deep": {"k": (1, None)}},
        modality="ct",
        channels=(Channel(name="ct", kind="ct", unit="HU"),),
        shape=(2, 3, 4),
        dtype="int16",
        geometry=VolumeGeometry(np.diag([2.0, 1.0, 1.0, 1.0])),
        identity=(("patient", "p"),),
    )
    again = unpack(pack(source))
    assert again.to_json() == source.to_json() and again.selector == source.selector
    assert not again.geometry.affine.flags.writeable


def test_large_arrays_travel_beside_the_text_and_are_not_copied():
    array = np.random.default_rng(0).normal(size=(3, 50, 7)).astype(np.float32)
    buffers: list[memoryview] = []
    text = pack((array, array[0, 0]), buffers)
    assert len(text) < 300 and [len(buffer) for buffer in buffers] == [array.nbytes]
    received = [np.frombuffer(bytearray(buffer), np.uint8) for buffer in buffers]
    large, small = unpack(text, received)
    np.testing.assert_array_equal(large, array)
    np.testing.assert_array_equal(small, array[0, 0])
    assert np.shares_memory(large, received[0]) and small.dtype == np.float32


@pytest.mark.parametrize("dtype", ["?", "i1", ">u2", "<i8", "<f4", ">f8"])
def test_an_array_without_buffers_is_exact(dtype):
    array = np.linspace(0, 1, 2 * INLINE_VALUES).astype(dtype).reshape(2, -1)
    again = unpack(pack(array))
    assert again.dtype == array.dtype and again.tobytes() == array.tobytes()


def test_numbers_of_numpy_keep_their_type():
    again = unpack(pack(np.float32(0.1)))
    assert type(again) is np.float32 and again == np.float32(0.1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"c":["os:system","true"]}', "no class of a reader"),
        ('{"c":["geomed_mae.readers.source:whole_window"]}', "no dataclass"),
        ('{"c":["geomed_mae.errors:ReadError","a","b"]}', "no dataclass"),
        ('{"c":["geomed_mae.no_such_module:X"]}', "not a packed value"),
        ('{"c":["geomed_mae.readers.source:Refusal",1]}', "has 3 fields, not 1"),
        ('{"e":["geomed_mae.readers.reasons:Reason","NO"]}', "not a packed value"),
        ('{"a":["O",[1],[1]]}', "no plain array"),
        ('{"a":["<f4",[4],0]}', "a buffer of 3 bytes is no array"),
        ('{"x":1}', "not a packed value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "not a packed value"),
    ],
)
def test_what_pack_does_not_write_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        unpack(text, [np.zeros(3, np.uint8)])


def test_a_class_of_somebody_else_is_not_unpacked():
    @dataclass
    class Local:
        value: int

    with pytest.raises(ValueError, match="no class of a reader"):
        unpack(pack(Local(1)))


def test_what_has_no_plain_form_is_named():
    with pytest.raises(TypeError, match="a builtins.object has no plain form"):
        pack((1, object()))
    with pytest.raises(TypeError, match="array of object has no plain form"):
        pack(np.array([object()]))


def test_plain_values_are_plain_json():
    assert json.loads(pack(("a", 1, None, True))) == ["a", 1, None, True]
