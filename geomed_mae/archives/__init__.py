"""Archives: folders of raw files, never written to, and what `scan` makes of them.

    index.py        the table of images, on disk and in memory; opens an Image by its key
    build.py        from files to an index: headers in parallel, then one full decode an image
    ledger.py       one line a file: used, skipped or unsupported, and why; the conservation law
    identity.py     keyed hashes: the only form in which identifiers leave the private files
    statistics.py   robust per-channel statistics over valid pixels
    splits.py       deterministic splits by group
    labels.py       which label file belongs to which image
    card.py         the drafted data card

No torch here: an index is built on machines that have none.
"""
