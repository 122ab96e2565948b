"""What a model has seen is known again, whatever it is called, and what is recorded gives no patient away."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.leakage import GROUND, LOOKS, PATIENT, PIXELS, check_parts, check_scored, no_scores_over_leaks
from geomed_mae.archives.ledger import Ledger
from geomed_mae.archives.seen import PRETRAINING, TRAINING, Seen, load_private, load_seen, save_private
from geomed_mae.errors import ConfigError, IntegrityError, LeakageError
from geomed_mae.image import PlaneGeometry
from geomed_mae.readers.source import Source

Ring = tuple[tuple[float, float], ...]


def box(west: float, south: float, size: float = 0.1) -> Ring:
    east, north = west + size, south + size
    return ((west, north), (east, north), (east, south), (west, south))


def looks(seed: int, flipped: int = 0) -> str:
    """A perceptual hash, with so many bits of it changed."""
    bits = np.random.default_rng(seed).random(256) > 0.5
    bits[:flipped] ^= True
    return f"2d:{np.packbits(bits).tobytes().hex()}"


def entry(pixels: str, **said: object) -> dict[str, object]:
    """An image: its pixels by a word, and `patient`, `study`, `frame`, `ring`, `look`, `file`, `group`, `shape`."""
    return {"pixels": pixels, **said}


_scans = iter(range(1_000_000))


def scanned(*entries: dict[str, object]) -> Index:
    """An index of these images, as a scan of its own would make it: keys, groups and salt are like no other's."""
    number = next(_scans)
    rows, sources, digests, hashes = [], {}, {}, {}
    for at, one in enumerate(entries):
        key = hashlib.md5(f"{number} {at}".encode()).hexdigest()
        ring = one.get("ring")
        rows.append(
            Row(
                key=key,
                modality="xray",
                channels=(),
                shape=one.get("shape", (64, 64)),
                dtype="uint8",
                geometry="raster" if ring else "plane",
                spacing=(10.0, 10.0) if ring else None,
                crs=None,
                footprint=ring,
                valid_fraction=1.0,
                statistics=(),
                group=str(one.get("group", f"group of {key}")),
                content="",
                flags=(),
            )
        )
        kinds = ("patient", "study", "series", "frame", "instance")
        sources[key] = Source(
            reader="dicom",
            files=(Path(str(one.get("file", f"/{key}"))),),
            modality="xray",
            channels=(),
            shape=(64, 64),
            dtype="uint8",
            geometry=PlaneGeometry(None),
            identity=tuple((kind, str(one[kind])) for kind in kinds if kind in one),
        )
        digests[key] = hashlib.sha256(str(one["pixels"]).encode()).hexdigest()
        hashes[key] = str(one.get("look", ""))
    return Index(tuple(rows), Ledger(()), sources, digests, bytes(32), hashes)


def pretrained(*entries: dict[str, object]) -> Seen:
    index = scanned(*entries)
    return Seen.of(index, index.rows, what=PRETRAINING)


def kinds_of(index: Index, seen: Seen, **how: object) -> dict[str, int]:
    """What a check finds between all images of an index and what was seen."""
    try:
        check_scored(index, index.rows, seen, **how)
    except LeakageError as error:
        assert error.exit_code == 6 and error.count == len(error.keys) > 0
        return error.kinds
    return {}


# ------------------------------------------------------------------------------------------- the kinds, across archives


MIXED = (
    entry("c", patient="P2|", study="S1", look=looks(3)),
    entry("d", patient="P2|", study="S2", look=looks(4)),
)
"""Study S1 has a second patient number here, by which S2, too, is of patient P1."""


@pytest.mark.parametrize(
    ("before", "now", "kinds"),
    [
        (entry("a", patient="P1|"), entry("b", patient="P1|"), {PATIENT: 1}),
        (entry("a", patient="P1|", study="S"), entry("b", patient="P2|", study="S"), {PATIENT: 1}),
        (entry("a", frame="F"), entry("b", frame="F"), {PATIENT: 1}),
        (entry("a", series="E"), entry("b", series="E"), {PATIENT: 1}),
        (entry("a", file="/x/4d.nii"), entry("b", file="/x/4d.nii"), {PATIENT: 1}),
        (entry("a", patient="P1|", look=looks(1)), entry("a", patient="P2|", look=looks(1)), {PIXELS: 1}),
        (entry("a", look=looks(1)), entry("b", look=looks(1)), {LOOKS: 1}),
        (entry("a", look=looks(1)), entry("b", look=looks(1, 20)), {LOOKS: 1}),
        (entry("a", ring=box(10, 45)), entry("b", ring=box(10.05, 45.02)), {GROUND: 1}),
        (entry("a", ring=box(10, 45)), entry("b", ring=box(10, 45)), {GROUND: 1}),
        (entry("a", ring=box(179.95, 5)), entry("b", ring=box(-179.98, 5)), {GROUND: 1}),
    ],
)
def test_each_kind_is_found_between_archives_that_were_scanned_apart(before, now, kinds):
    assert kinds_of(scanned(now, entry("z", patient="P9|", ring=None)), pretrained(before)) == kinds


def test_a_patient_is_found_through_an_image_that_has_both_numbers():
    index = scanned(*MIXED)
    seen = pretrained(entry("a", patient="P1|", study="S1"))
    labelled = index.rows[1]
    with pytest.raises(LeakageError, match="same patient or study 1"):
        check_scored(index, [labelled], seen)
    check_scored(index.subset([labelled]), [labelled], seen)  # without the image in between nothing says so
    before = scanned(*MIXED)
    with pytest.raises(LeakageError, match="same patient or study 1"):
        now = scanned(entry("e", patient="P7|", study="S1"))
        check_scored(now, now.rows, Seen.of(before, before.rows[1:], what=PRETRAINING))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (entry("a", patient="P1|", study="S1"), entry("b", patient="P2|", study="S2")),
        (entry("a", patient="1|hospital A"), entry("b", patient="1|hospital B")),
        (entry("a", patient="ANONYMOUS|"), entry("b", patient="anonymous|")),
        (entry("a", patient="0000|"), entry("b", patient="0000|")),
        (entry("a", study="S1"), entry("b", frame="S1")),
        (entry("a", look=looks(1)), entry("b", look=looks(1, 21))),
        (entry("a", look=""), entry("b", look="")),
        (entry("a", ring=box(10, 45)), entry("b", ring=box(10.1, 45))),
        (entry("a", ring=box(10, 45)), entry("b", ring=box(10.3, 45))),
        (entry("a", ring=box(10, 45), file="/x/a.tif"), entry("b", ring=box(12, 45), file="/x/a.tif")),
    ],
)
def test_what_only_resembles_is_let_pass(before, now):
    assert kinds_of(scanned(now), pretrained(before)) == {}


def test_ground_within_the_buffer_counts_and_ground_beyond_it_does_not():
    seen, now = pretrained(entry("a", ring=box(10, 45))), scanned(entry("b", ring=box(10.11, 45)))
    # A hundredth of a degree of longitude at 45 degrees is 787 m.
    assert kinds_of(now, seen, buffer_m=700.0) == {}
    assert kinds_of(now, seen, buffer_m=800.0) == {GROUND: 1}


def test_a_group_of_the_same_index_is_known_without_the_private_part():
    index = scanned(entry("a", group="G"), entry("b", group="G"), entry("c", group="H"))
    seen = Seen.from_public(Seen.of(index, index.rows[:1], what=PRETRAINING).public(), "it")
    assert all(part.private is None for part in seen.parts)
    check_scored(index, index.rows[2:], seen)
    with pytest.raises(LeakageError, match="same patient or study 1"):
        check_scored(index, index.rows[1:2], seen)


def test_groups_of_rasters_may_be_split_as_blocks_part_chains_of_scenes():
    chain = [entry(str(n), ring=box(10 + 0.08 * n, 45), group="chain") for n in range(4)]
    index = scanned(*chain)
    check_parts(index, index.rows[3:], index.rows[:2], seen=Seen.nothing())
    with pytest.raises(LeakageError, match="shared ground 1"):
        check_parts(index, index.rows[3:], index.rows[:3], seen=Seen.nothing())


# ----------------------------------------------------------------------------------------- what follows from a finding


def test_an_error_names_five_keys_the_number_and_the_kinds():
    index = scanned(*(entry(str(number), look=looks(number)) for number in range(7)), entry("other"))
    seen = Seen.of(index, index.rows[:7], what=PRETRAINING)
    with pytest.raises(LeakageError) as caught:
        check_scored(index, index.rows, seen)
    keys = [row.key for row in index.rows]
    assert "7 of the 8 test images were pretrained on" in str(caught.value) and "same pixels 7" in str(caught.value)
    assert all(key in str(caught.value) for key in keys[:5]) and keys[5] not in str(caught.value)
    assert "and 2 more" in str(caught.value) and "--transductive" in str(caught.value)
    assert caught.value.kinds[PIXELS] == caught.value.count == 7 and caught.value.keys == tuple(keys[:5])


def test_transductive_allows_and_counts_pretraining_and_never_training():
    index = scanned(entry("a", patient="P1|"), entry("b", patient="P2|"), entry("c", patient="P3|"))
    seen = Seen.of(index, index.rows[:2], what=PRETRAINING)
    found = check_scored(index, index.rows, seen, transductive=True)
    counted = {"allowed": True, "test_images_pretrained_on": 2, "kinds": {PIXELS: 2, PATIENT: 2}}
    assert found["transductive"] == counted
    assert "transductive" not in check_scored(index, index.rows[2:], seen)
    trained = Seen.of(index, index.rows[:1], what=TRAINING) + seen
    with pytest.raises(LeakageError, match=r"^1 of the 3 labelled images were trained on") as caught:
        check_scored(index, index.rows, trained, transductive=True)
    assert "--transductive" not in str(caught.value)


def test_a_record_says_with_what_was_compared():
    index = scanned(entry("a"), entry("b"), entry("c"), entry("d"))
    test, train, validation, more = index.rows
    seen = Seen.of(index, [more], what=PRETRAINING)
    found = check_parts(index, [test], [train], [validation], seen=seen, buffer_m=5.0)
    assert found == {
        "leakage": {
            "test_images": 1,
            "buffer_m": 5.0,
            "compared_with": {TRAINING: 2, PRETRAINING: 1},
            "not_compared": [],
        }
    }
    json.dumps(found)


def test_an_encoder_of_which_nothing_is_recorded_is_said_to_be_one(caplog):
    index = scanned(entry("a"))
    found = check_scored(index, index.rows, None)
    assert found["leakage"]["not_compared"] == ["pretraining: nothing is recorded"]
    assert "whether test images are among them is unknown" in caplog.text


def test_parts_of_one_task_have_nothing_in_common():
    index = scanned(
        entry("a", patient="P1|"), entry("b", patient="P2|"), entry("c", patient="P3|"), entry("d", patient="P1|")
    )
    one, two, three, one_again = index.rows
    check_parts(index, [one], [two], [three], seen=Seen.nothing())
    for parts in (([one], [one_again], []), ([one], [two], [one_again]), ([two], [one], [one_again])):
        with pytest.raises(LeakageError, match=r"images belong with images of another part .*one INDEX"):
            check_parts(index, *parts, seen=Seen.nothing(), transductive=True)
    check_parts(index, [], [one, two], seen=Seen.nothing(), unit="none")


def test_blocks_of_the_same_scene_are_no_leak_and_blocks_on_different_grids_are():
    here = box(10, 45)
    index = scanned(
        entry("a", ring=here), entry("b", ring=here), entry("c", ring=box(10.03, 45)), entry("d", look=looks(1))
    )
    one, other_date, shifted, plane = index.rows
    check_parts(index, [one], [one], seen=Seen.nothing(), unit="block")
    check_parts(index, [one, other_date, plane], [one, other_date, plane], seen=Seen.nothing(), unit="block")
    with pytest.raises(LeakageError, match="show the same on different grids"):
        check_parts(index, [one, shifted], [one, shifted], seen=Seen.nothing(), unit="block")
    with pytest.raises(LeakageError, match="1 of the 1 test images were pretrained on"):
        check_parts(index, [one], [one], seen=Seen.of(index, [one], what=PRETRAINING), unit="block")


def test_an_older_score_does_not_outlive_a_refused_one(tmp_path):
    old = tmp_path / "scores.json"
    old.write_text("{}")
    with pytest.raises(ConfigError), no_scores_over_leaks(old):
        raise ConfigError("something else")
    assert old.exists()
    with pytest.raises(LeakageError), no_scores_over_leaks(old, tmp_path / "none.json"):
        raise LeakageError("seen")
    assert not old.exists()


# ---------------------------------------------------------------------------------------------------- the record itself


FULL = (
    entry("a", patient="12345678|", study="1.2.3", series="1.2.4", frame="1.2.5", look=looks(5)),
    entry("b", patient="87654321|", study="1.2.6", look=looks(6)),
    entry("c", ring=box(10, 45)),
)


def test_the_public_part_holds_nothing_by_which_a_patient_could_be_guessed():
    index = scanned(*FULL)
    seen = Seen.of(index, index.rows, what=PRETRAINING)
    public = json.loads(seen.public())
    assert set(public["parts"][0]) == {"what", "salt", "images", "contents", "groups", "places", "withheld"}
    salts = [bytes.fromhex(public["parts"][0]["salt"]), b""]
    held = set(public["parts"][0]["contents"]) | set(public["parts"][0]["groups"])
    from geomed_mae.archives.identity import keyed

    values = {value for one in FULL for value in map(str, one.values())}
    words = {word for value in values for word in (value, value.removesuffix("|"))}
    kinds = ("identity", "patient", "study", "series", "frame", "group", "content")
    for salt in salts:
        for word in words:
            tried = {keyed(salt, word), *(keyed(salt, kind, word) for kind in kinds)}
            tried |= {keyed(salt, "identity", kind, word) for kind in kinds}
            assert not tried & held
    text = seen.public().decode()
    private = seen.parts[0].private
    assert not any(word in text for word in (*private.identities, *private.looks, private.salt, looks(5)[3:]))
    assert private.salt != public["parts"][0]["salt"]


def test_every_record_has_salts_of_its_own():
    index = scanned(*FULL)
    one, other = (Seen.of(index, index.rows, what=TRAINING).parts[0] for _ in range(2))
    assert not one.contents & other.contents and not one.groups & other.groups
    assert not one.private.identities & other.private.identities


def test_a_record_comes_back_as_it_was(tmp_path):
    seen = pretrained(*FULL) + pretrained(entry("z")) + Seen.unknown()
    folder = tmp_path / "run" / "encoder"
    folder.mkdir(parents=True)
    save_private(tmp_path / "run", seen)
    assert load_seen(seen.public(), folder, "pretrained_on.json") == seen
    assert seen.unrecorded == (PRETRAINING,) and len(seen.parts) == 2


def test_the_private_part_is_for_its_owner_alone(tmp_path):
    save_private(tmp_path, pretrained(*FULL))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["seen.json"]
    assert (tmp_path / "private" / "seen.json").stat().st_mode & 0o777 == 0o600
    text = (tmp_path / "private" / "seen.json").read_text()
    assert "12345678" not in text and "1.2.3" not in text and str(tmp_path) not in text


def test_without_the_private_part_the_rest_is_compared_and_the_gap_is_recorded(tmp_path, caplog):
    index = scanned(*FULL)
    shared = load_seen(Seen.of(index, index.rows, what=PRETRAINING).public(), tmp_path / "encoder", "it")
    other = scanned(entry("e", patient="12345678|", look=looks(5)))
    found = check_scored(other, other.rows, shared)
    assert found["leakage"]["not_compared"] == ["pretraining: identities", "pretraining: looks"]
    assert "patients and look-alikes were not compared" in caplog.text
    assert kinds_of(scanned(FULL[0]), shared) == {PIXELS: 1}
    assert kinds_of(scanned(entry("f", ring=box(10.01, 45))), shared) == {GROUND: 1}


def test_a_private_part_of_another_run_is_not_taken_for_this_ones(tmp_path):
    (tmp_path / "encoder").mkdir()
    save_private(tmp_path, pretrained(entry("other", patient="P|")))
    seen = load_seen(pretrained(*FULL).public(), tmp_path / "encoder", "it")
    assert seen.parts[0].private is None and seen.parts[0].missing == ("identities", "looks")


def test_what_a_model_began_from_is_part_of_what_it_has_seen():
    first, second = pretrained(entry("a")), pretrained(entry("b"))
    both = second + first + first
    assert [part.images for part in both.parts] == [1, 1]
    assert kinds_of(scanned(entry("a")), both) == kinds_of(scanned(entry("b")), both) == {PIXELS: 1}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "geomed-mae seen", "version": 1, "parts": [3]}'])
def test_a_damaged_record_is_refused(text):
    with pytest.raises(IntegrityError, match="it is no record of what a model has seen"):
        Seen.from_public(text.encode(), "it")


def test_a_newer_record_is_named_as_such():
    with pytest.raises(ConfigError, match="is of version 2, not 1"):
        Seen.from_public(b'{"format": "geomed-mae seen", "version": 2}', "it")


@pytest.mark.parametrize("text", ["", "[]", '{"parts": {"a": 1}}'])
def test_a_damaged_private_part_is_refused_with_the_way_out(tmp_path, text):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "seen.json").write_text(text)
    with pytest.raises(IntegrityError, match="restore it, or delete it and do without comparing patients"):
        load_private(tmp_path)


@pytest.mark.slow
def test_a_hundred_thousand_images_are_compared_in_seconds():
    """Chips of a mosaic, each its own patient and look; a fifth is tested. Some 10 s of a core, each."""
    count, side = 100_000, 316
    chips = [entry(str(at), patient=f"P{at}|", look=looks(at), group=at) for at in range(count)]
    planes = scanned(*chips)
    started = time.process_time()
    seen = Seen.of(planes, planes.rows[20_000:], what=PRETRAINING)
    check_parts(planes, planes.rows[:20_000], planes.rows[20_000:], seen=seen)
    assert time.process_time() - started < 60
    grid = scanned(
        *(entry(str(at), ring=box(0.02 * (at % side), 40 + 0.02 * (at // side), 0.02)) for at in range(count))
    )
    started = time.process_time()
    check_parts(grid, grid.rows[:20_000], grid.rows[20_000:], seen=Seen.nothing())
    assert time.process_time() - started < 60
