"""A batch is a function of its step, whoever makes it and whenever."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.loader import Steps, batches

CONFIG = DataConfig(modality=("landsat7",), crop_2d=(16, 16), crops_per_read=2, shuffle_steps=3)


def same(one: Batch, other: Batch) -> bool:
    plain = ("modality", "channels", "keys", "statistics", "step", "failed", "samples")
    one, other = one.physical(), other.physical()
    return (
        torch.equal(one.raw, other.raw)
        and torch.equal(one.valid, other.valid)
        and torch.equal(one.spacing, other.spacing)
        and all(getattr(one, name) == getattr(other, name) for name in plain)
    )


@pytest.fixture
def archive(memory_index):
    rng = np.random.default_rng(0)
    for size in (24, 40, 12):
        valid = rng.random((1, size, size + 4)) > 0.1
        memory_index.add(rng.random((3, size, size + 4)) * 200, valid=valid, spacing=(30.0, 15.0))
    return memory_index


def make(index, start=0, stop=5, **changes):
    config = CONFIG.model_copy(update=changes)
    made = batches(index, config, seed=5, start_step=start, steps=stop, batch_size=6)
    return [batch.physical() for batch in made]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_bits(archive):
    alone = make(archive)
    for workers in (1, 3):
        assert all(same(*pair) for pair in zip(alone, make(archive, workers=workers), strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("start", [3, 4, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_gives_the_same_bits_within_a_window_too(archive, start, workers):
    alone, later = make(archive, stop=9)[start:], make(archive, start=start, stop=9, workers=workers)
    assert all(same(*pair) for pair in zip(alone, later, strict=True))


def test_the_cache_changes_nothing(archive):
    assert all(same(*pair) for pair in zip(make(archive), make(archive, cache_mb=0), strict=True))
    assert archive.window_reads > 0 and archive.whole_reads > 0


def test_steps_and_seeds_give_different_crops(archive):
    first, second, *_ = make(archive)
    other = next(iter(batches(archive, CONFIG, seed=6, start_step=0, steps=1, batch_size=6)))
    assert not torch.equal(first.raw, second.raw) and not torch.equal(first.raw, other.raw)


def test_pixels_come_from_the_image_that_the_key_names(archive):
    config = CONFIG.model_copy(update={"crops_per_read": 1})
    for batch in batches(archive, config, seed=0, start_step=0, steps=3, batch_size=4):
        for raw, valid, key in zip(batch.raw, batch.valid, batch.keys, strict=True):
            known = set(archive.images[key].array[0].ravel().tolist())
            assert set(raw[0][valid[0]].tolist()) <= known


def test_spacing_follows_the_quarter_turns(archive):
    pairs = {tuple(pair) for batch in make(archive, stop=20) for pair in batch.spacing.tolist()}
    assert pairs == {(30.0, 15.0), (15.0, 30.0)}


def test_a_batch_says_shapes_types_and_physics(archive):
    batch = make(archive, stop=1)[0]
    assert batch.raw.shape == batch.valid.shape == (6, 3, 16, 16)
    assert batch.raw.dtype == torch.float32 and batch.valid.dtype == torch.bool
    assert len(batch) == len(batch.keys) == len(batch.statistics) == 6
    assert (batch.raw[~batch.valid] == 0).all() and 0 < batch.valid_fraction < 1
    assert [channel.name for channel in batch.channels] == ["B1", "B2", "B3"]


def test_channels_are_selected_by_name_with_their_statistics(archive):
    whole, part = make(archive, stop=1)[0], make(archive, stop=1, channels=("B3", "B1"))[0]
    assert torch.equal(part.raw, whole.raw[:, [2, 0]])
    assert part.statistics[0] == (whole.statistics[0][2], whole.statistics[0][0])


def test_crops_with_too_few_valid_pixels_are_drawn_again(memory_index):
    valid = np.zeros((1, 200, 200), bool)
    valid[:, :40, :40] = True
    memory_index.add(np.ones((1, 200, 200)), valid=valid)
    shares = {}
    for least in (0.0, 0.9):
        config = CONFIG.model_copy(update={"min_valid": least, "crops_per_read": 1})
        made = list(batches(memory_index, config, seed=0, start_step=0, steps=10, batch_size=8))
        shares[least] = np.mean([batch.valid_fraction for batch in made])
    assert shares[0.9] > 3 * shares[0.0]


def test_an_image_that_no_longer_reads_is_replaced_and_named(archive):
    archive.broken = {"image1"}
    made = make(archive, stop=6, cache_mb=0)
    assert any("image1: TRUNCATED" in batch.failed for batch in made)
    assert all("image1" not in batch.keys for batch in made)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_archive_that_is_gone_is_one_typed_error(archive, workers):
    archive.broken = {"image0", "image1", "image2"}
    with pytest.raises(ReadError, match=r"3 images in a row could not be read.*TRUNCATED.*still in place"):
        make(archive, workers=workers, cache_mb=0)


def test_examples_are_no_training_crops_and_are_not_turned(archive):
    steps = Steps(archive, CONFIG, seed=5, batch_size=6)
    batch = steps.examples(steps.buckets[0], 3)
    assert len(batch) == 3 and {tuple(pair) for pair in batch.spacing.tolist()} == {(30.0, 15.0)}
    assert same(batch, steps.examples(steps.buckets[0], 3))


@pytest.fixture
def stored(tmp_path):
    """A scanned archive of two GeoTIFFs in tiles and strips, with nodata, and their pixels by key."""
    from geomed_mae.archives.build import open_archive
    from tests.make_data import write_geotiff

    rng = np.random.default_rng(0)
    layouts = {"tiles": {"tiled": True, "blockxsize": 32, "blockysize": 32}, "strips": {"blockysize": 4}}
    for name, layout in layouts.items():
        array = rng.integers(1, 10_000, (2, 150, 170)).astype(np.uint16)
        array[:, :40, :30] = 0
        write_geotiff(
            tmp_path / f"{name}.tif", array, nodata=0, compress="deflate", descriptions=["B02", "B03"], **layout
        )
    return open_archive([tmp_path], ["sentinel2-l2a"])


STORED = DataConfig(modality=("sentinel2-l2a",), crop_2d=(16, 16), cache_mb=0)


def test_rows_of_rasters_know_their_blocks(stored):
    assert {row.block for row in stored.rows} == {(32, 32), (4, 170)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_crops_read_together_from_files_are_the_same_by_any_worker_and_from_the_cache(stored):
    def make(start=0, **changes):
        config = STORED.model_copy(update=changes)
        return list(batches(stored, config, seed=3, start_step=start, steps=6, batch_size=16))

    alone = make()
    for other in (make(workers=1), make(workers=3), make(cache_mb=512)):
        assert all(same(*pair) for pair in zip(alone, other, strict=True))
    assert all(same(*pair) for pair in zip(alone[4:], make(start=4), strict=True))


def test_crops_read_together_are_pixels_of_the_file(stored):
    whole = {row.key: stored.read(row.key) for row in stored.rows}
    config = STORED.model_copy(update={"min_valid": 0.0})
    steps = Steps(stored, config, seed=0, batch_size=16)
    turned = [(k, flip) for k in range(4) for flip in (False, True)]
    for step in range(4):
        batch = steps[step].physical()
        for raw, valid, key in zip(batch.raw.numpy(), batch.valid.numpy(), batch.keys, strict=True):
            image = whole[key]
            corners = {
                (r, c)
                for k, flip in turned
                for view in [np.rot90(raw[0][:, ::-1] if flip else raw[0], k)]
                for r, c in np.argwhere(image.array[0] == view[0, 0])
                if np.array_equal(image.array[0][r : r + 16, c : c + 16], view)
            }
            assert corners
            assert ((raw == 0) == ~valid).all()


def test_each_crop_of_a_read_that_has_too_few_valid_pixels_is_drawn_again_by_itself(memory_index):
    valid = np.zeros((1, 64, 640), bool)
    valid[..., :320] = True
    memory_index.add(np.ones((1, 64, 640)), valid=valid, block=(64, 640))
    config = CONFIG.model_copy(update={"min_valid": 0.9, "crops_per_read": 8})
    made = list(batches(memory_index, config, seed=0, start_step=0, steps=20, batch_size=8))
    shares = torch.cat([batch.physical().valid.float().mean(dim=(1, 2, 3)) for batch in made])
    assert (shares >= 0.9).float().mean() > 0.97


def test_memory_of_a_batch_is_used_again_only_when_nothing_of_it_is_held(archive):
    steps = Steps(archive, CONFIG, seed=5, batch_size=6)
    kept = [steps[3 * number].raw[1:3, 0] for number in range(4)]  # one of each window
    copies = [part.clone() for part in kept]
    as_numpy = steps[13].valid.numpy()[0]
    before = as_numpy.copy()
    places = []
    for number in range(5, 20):
        batch = steps[3 * number]
        places.append(batch.raw.data_ptr())
        del batch
    assert len(set(places)) < len(places) / 2, "memory that is free is used again"
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert np.array_equal(as_numpy, before)


def test_steps_travel_to_other_processes_without_their_memory(archive):
    import copy

    steps = Steps(archive, CONFIG, seed=5, batch_size=6)
    batch = steps[0]
    other = copy.deepcopy(steps)
    assert not other.memory.given and other._window is None and same(batch, other[0])


WHOLE = DataConfig(modality=("landsat7",), crop_2d=(16, 16), crops_per_read=4, shuffle_steps=4, min_valid=0.0)


@pytest.fixture
def mixed(memory_index):
    """Forty images of two channel lists, each image of one value of its own, with holes."""
    rng = np.random.default_rng(1)
    for number in range(40):
        valid = rng.random((1, 40, 44)) > 0.2
        memory_index.add(np.full((1 + number % 2, 40, 44), float(number)), valid=valid, block=(16, 16))
    return memory_index


def joined(parts: list[Batch]) -> Batch:
    """Put the parts of a batch that several processes made together again."""
    from dataclasses import replace

    parts = [part.physical() for part in parts]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("raw", "valid", "spacing")}
    lists = {name: sum((getattr(part, name) for part in parts), ()) for name in ("keys", "statistics", "samples")}
    return replace(parts[0], **whole, **lists)


@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_processes_together_make_the_batch_that_one_makes_alone(mixed, world):
    alone = Steps(mixed, WHOLE, seed=3, batch_size=12)
    ranks = [Steps(mixed, WHOLE, seed=3, batch_size=12, rank=rank, world=world) for rank in range(world)]
    for step in (0, 1, 5, 6, 11):
        assert same(alone[step], joined([own[step] for own in ranks]))
    assert alone[0].samples == tuple(range(12)) and ranks[1][0].samples == tuple(range(12 // world, 24 // world))


def test_a_process_decodes_its_own_reads_and_no_others(memory_index):
    memory_index.add(np.ones((1, 400, 400)), block=(16, 16))
    config = WHOLE.model_copy(update={"cache_mb": 0})
    counts = {}
    for world in (1, 2, 4):
        memory_index.window_reads = 0
        steps = Steps(memory_index, config, seed=0, batch_size=8, rank=world - 1, world=world)
        for step in range(8):
            _ = steps[step]
        counts[world] = memory_index.window_reads
    assert counts == {1: 64, 2: 32, 4: 16}


@pytest.mark.parametrize(("rank", "world"), [(0, 5), (4, 4), (-1, 2)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(mixed, rank, world):
    with pytest.raises(ConfigError, match=rf"train.batch_size 12 cannot be shared evenly by {world} processes"):
        Steps(mixed, WHOLE, seed=3, batch_size=12, rank=rank, world=world)


def test_batches_have_more_places_the_more_steps_share_their_reads(mixed):
    def places(shuffle: int) -> float:
        config = WHOLE.model_copy(update={"shuffle_steps": shuffle})
        steps = Steps(mixed, config, seed=3, batch_size=12)
        return float(np.mean([len(set(steps[step].keys)) for step in range(24)]))

    assert places(1) <= 3 and places(8) > 2 * places(1)


class Counting:
    """Counts the reads of an index, and the windows of each."""

    def __init__(self, index) -> None:
        self.index, self.reads = index, []

    def __getattr__(self, name: str):
        return getattr(self.index, name)

    def read_many(self, key, windows):
        self.reads.append(len(windows))
        return self.index.read_many(key, windows)


def test_a_window_is_made_once_bucket_by_bucket_and_its_reads_are_shared(mixed):
    counting = Counting(mixed)
    steps = Steps(counting, WHOLE.model_copy(update={"cache_mb": 0}), seed=3, batch_size=12)
    buckets = [steps.bucket_of(step) for step in range(8)]
    first = next(n for n in range(0, 8, 4) if len({id(bucket) for bucket in buckets[n : n + 4]}) == 2)
    own = sum(bucket is buckets[first] for bucket in buckets[first : first + 4])
    _ = steps[first]
    assert sum(counting.reads) == own * 12 and len(counting.reads) == own * 3, "the other bucket's crops can wait"
    for step in range(first, first + 4):
        _ = steps[step]
    assert counting.reads == [4] * 12, "48 crops of the window in twelve reads of four, none of them read again"


def test_every_place_is_as_likely_for_a_crop_that_is_dealt_out(memory_index):
    array = np.arange(40 * 44, dtype=np.float32).reshape(1, 40, 44)
    memory_index.add(array, block=(16, 16))
    config = WHOLE.model_copy(update={"shuffle_steps": 2})
    steps = Steps(memory_index, config, seed=0, batch_size=4, augment=False)
    # One slot of a window, so that the drawn places are independent of each other.
    corners = np.array([int(steps[2 * window + 1].raw[2, 0, 0, 0]) for window in range(1500)])
    for starts, room in ((corners // 44, 25), (corners % 44, 29)):
        expected = len(corners) / room
        chi2 = ((np.bincount(starts, minlength=room) - expected) ** 2 / expected).sum()
        assert abs(chi2 - (room - 1)) < 5 * np.sqrt(2 * (room - 1))


def test_without_augmentation_nothing_is_turned(memory_index):
    memory_index.add(np.arange(900, dtype=np.float32).reshape(1, 30, 30))
    batch = Steps(memory_index, WHOLE, seed=0, batch_size=16, augment=False)[0].physical()
    assert (batch.raw.diff(dim=3) == 1).all() and (batch.raw.diff(dim=2) == 30).all()


@pytest.mark.parametrize("shuffle", [1, 4])
def test_stored_integers_give_the_bits_of_a_reading_in_floats(tmp_path, monkeypatch, shuffle):
    from geomed_mae.archives.build import open_archive
    from geomed_mae.archives.index import Index
    from tests.make_data import write_geotiff

    array = np.random.default_rng(0).integers(1, 10_000, (2, 90, 80)).astype(np.uint16)
    array[:, :40, :30] = 0
    for number in range(3):
        write_geotiff(tmp_path / f"{number}.tif", array + number, nodata=number, descriptions=["B02", "B03"])
    index = open_archive([tmp_path], ["sentinel2-l2a"])
    config = STORED.model_copy(update={"shuffle_steps": shuffle, "channels": ("B03", "B02")})
    made = list(batches(index, config, seed=3, start_step=0, steps=5, batch_size=8))
    assert all(batch.raw.dtype == torch.uint16 and batch.valid.shape[1] == 1 for batch in made)
    monkeypatch.setattr(Index, "read_many_stored", lambda *_: None)
    floats = list(batches(index, config, seed=3, start_step=0, steps=5, batch_size=8))
    assert all(batch.raw.dtype == torch.float32 and batch.stored is None for batch in floats)
    assert all(same(*pair) for pair in zip(made, floats, strict=True))
    assert any(not batch.valid.all() for batch in made) and len({key for batch in made for key in batch.keys}) == 3


def test_an_image_smaller_than_the_crop_is_read_once_a_crop(memory_index):
    memory_index.add(np.random.default_rng(0).normal(size=(6, 10, 10)))
    config = CONFIG.model_copy(update={"min_valid": 0.5, "cache_mb": 0, "crops_per_read": 1, "shuffle_steps": 1})
    assert config.crop_2d[0] >= 16, "a crop of which the image fills less than the half that is asked for"
    batch = next(batches(memory_index, config, seed=0, start_step=0, steps=1, batch_size=4))
    assert len(batch) == 4 and memory_index.window_reads + memory_index.whole_reads == 4
