"""Exporters: an encoder or a fine-tuned model -> the folder that another tool opens. One file per target.

The folder is the registry: an exporter is a module in it (or an entry point of group `geomed_mae.exporters`) with

    TAKES: tuple[str, ...]      "encoder", "model" or both; where a target takes encoders alone, a fine-tuned run gives
                                its fine-tuned encoder
    export(request, out)        writes the folder `out`; returns `folder.outcome` with `parity`, which `proof.prove`
                                returns

and, where it applies,

    DECODER = True              it takes a decoder (`--decoder`, Request.mae)
    WHOLE = True                it writes the model as it is: no channels, size or spacing are chosen

It writes inside `folder.building`, opens what it wrote with the target's own runtime, and holds it against the original
with `proof.prove`: a model that does not compute the same is an IntegrityError, and then nothing is left behind.

    request     what is asked for, checked
    fixed       plain networks for one list of channels: what a graph can hold
    proof       the image to compare on, the original's answer, the verdict
    card        README.md and contract.json
    graph       the plain network as a graph of torch.export, of any batch and size, with nothing of this machine in it
    onnx_file   a graph as an ONNX file with the contract in its metadata
    folder      written whole or not at all; the native weights beside a foreign form
"""
