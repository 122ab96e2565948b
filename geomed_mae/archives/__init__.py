"""Archives: folders of raw files, never written to, and what `scan` makes of them.

    index.py        the table of images, on disk and in memory; opens an Image by its key
    build.py        from files to an index: headers first, then one full decode an image
    headers.py      the first pass: which files there are, what their headers say
    examine.py      the second pass: what the pixels of one image say
    journal.py      what earlier scans have learned: scans are restartable and incremental
    workers.py      who does the work: threads with a decoding child each, or a Dask cluster
    ledger.py       one line a file: used, skipped or unsupported, and why; the conservation law
    identity.py     keyed hashes: the only form in which identifiers leave the private files
    statistics.py   robust per-channel statistics over valid pixels
    duplicates.py   exact and perceptual duplicates
    places.py       footprints on the globe: overlaps, distances, equal-area blocks
    components.py   who belongs together when some pairs are known to
    splits.py       deterministic splits by group and by buffered spatial block
    split_file.py   the split that is stored with an index
    label_pairs.py  which label files could belong to which images
    labels.py       the labels of images, read and placed
    label_values.py what label values mean: recipe to query, stored values to class numbers
    class_labels.py which class each image has, from a table or a folder of classes
    card.py         the drafted data card
    pictures.py     its contact sheets and histograms
    views.py        what a person sees of an image
    terminal.py     the same in characters
    inspection.py   descriptions of files, folders and indexes as plain values

No torch here: an index is built on machines that have none.
"""
