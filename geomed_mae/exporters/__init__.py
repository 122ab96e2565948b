"""Exporters: an encoder -> the folder that another tool opens. One file per target; the folder is the registry.

An exporter is a module in this folder (or an entry point of group `geomed_mae.exporters`) with one function:

    export(encoder, out, *, modality, channels=None, size=None) -> dict

`encoder` is a `models.pretrained.PretrainedEncoder`, `out` the folder to write, `channels` names in the order of the
exported model's input, `size` its input size. The result says what was written and how far the exported model is from
the encoder; a model that does not compute the same is an IntegrityError, and then nothing is left behind.
"""
