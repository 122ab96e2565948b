"""Keyed hashes and groups."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geomed_mae.archives.identity import PixelDigest, connected_groups, keyed, new_salt
from geomed_mae.image import Channel, Image, PlaneGeometry


def plane(values: list[float], valid: list[bool]) -> Image:
    array = np.array(values, np.float32).reshape(1, 1, -1)
    return Image(array, np.array(valid).reshape(1, 1, -1), (Channel(name="x"),), PlaneGeometry(), "test")


def pixel_digest(image: Image) -> str:
    digest = PixelDigest(image.array.shape)
    digest.add(image)
    return digest.hex()


def test_a_key_depends_on_the_salt():
    assert keyed(new_salt(), "MRN-0001") != keyed(new_salt(), "MRN-0001")


def test_parts_of_a_key_are_kept_apart():
    salt = new_salt()
    assert keyed(salt, "ab", "c") != keyed(salt, "a", "bc")


def test_pixel_digests_see_values_and_validity():
    base = pixel_digest(plane([1, 2], [True, True]))
    assert base == pixel_digest(plane([1, 2], [True, True]))
    assert base != pixel_digest(plane([1, 3], [True, True]))
    assert base != pixel_digest(plane([1, 2], [True, False]))


def test_one_study_under_two_patient_numbers_is_one_subject():
    groups = connected_groups(
        [
            [("patient", "A"), ("study", "1")],
            [("patient", "B"), ("study", "1")],
            [("patient", "B"), ("study", "2")],
            [("patient", "C"), ("study", "3")],
        ]
    )
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_patient_number_is_not_taken_for_a_study_number():
    assert len(set(connected_groups([[("patient", "1")], [("study", "1")]]))) == 2


@given(st.lists(st.lists(st.tuples(st.sampled_from("ps"), st.integers(0, 5).map(str)), max_size=3), max_size=12))
def test_groups_are_the_connected_components(identities):
    groups = connected_groups(identities)
    # Oracle: repeated merging of sets until nothing changes.
    sets = [({("node", str(node)), *pairs}, {node}) for node, pairs in enumerate(identities)]
    merged = True
    while merged:
        merged = False
        for i in range(len(sets)):
            for j in range(i + 1, len(sets)):
                if sets[i][0] & sets[j][0]:
                    sets[i] = (sets[i][0] | sets[j][0], sets[i][1] | sets[j][1])
                    del sets[j]
                    merged = True
                    break
            if merged:
                break
    expected = {frozenset(nodes) for _, nodes in sets}
    found: dict[int, set[int]] = {}
    for node, group in enumerate(groups):
        found.setdefault(group, set()).add(node)
    assert {frozenset(nodes) for nodes in found.values()} == expected
