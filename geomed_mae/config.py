"""Recipes: YAML files read into frozen, closed pydantic models.

A recipe binds archive, model, training and (downstream) labels and head. Its keys are grouped by consequence, and each
field says its group: `science` changes the result, `run` changes how long and how often, `speed` must not change
results. Files of them are read and written by `recipe_file`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


def science(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that changes the result."""
    return Field(default, json_schema_extra={"group": "science"}, **kwargs)


def run(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that changes how long, how often and where, not what is learned per step."""
    return Field(default, json_schema_extra={"group": "run"}, **kwargs)


def speed(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that must not change results."""
    return Field(default, json_schema_extra={"group": "speed"}, **kwargs)


class Section(BaseModel):
    """Frozen, closed base of every part of a recipe; docstrings of fields become their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Pair = tuple[PositiveInt, PositiveInt]
Triple = tuple[PositiveInt, PositiveInt, PositiveInt]
Spacing = Annotated[float, Field(gt=0)]


class DataConfig(Section):
    """What is read from the archive and how samples are cut from it."""

    modality: tuple[str, ...] = science(("auto",))
    """Modalities that files may have: names, YAML files, or "auto". A single name may be given without a list."""
    channels: tuple[str, ...] | None = science(None)
    """Use only these channels, by name; None takes all that an image has. Images that lack one are an error."""
    split: str | None = science(None)
    """Use only the images of this part (train, validation, test) of the split that is stored with the index."""
    crop_2d: Pair | None = science(None)
    """Crop of rasters and planes in pixels (rows, columns); a multiple of model.patch_2d."""
    crop_3d: Triple | None = science(None)
    """Crop of volumes in voxels (slices, rows, columns); a multiple of model.patch_3d."""
    min_valid: float = science(0.25, ge=0.0, le=1.0)
    """A pretraining crop with a smaller share of valid pixels, of those that the image can give, is drawn again."""
    weights: dict[str, float] | None = science(None)
    """Relative shares of the steps that the modalities of a mixed archive get; None goes by their valid pixels."""
    crops_per_read: int | None = science(None, ge=1)
    """Neighbouring crops that are cut from the same decoded blocks: faster on large compressed scenes, at the price of
    fewer places in the steps that share them (shuffle_steps). 1 draws every crop by itself; None is at most 16, and so
    few that these steps have several reads to share (4 for one step, up to 16)."""
    shuffle_steps: int = science(8, ge=1)
    """Steps whose crops are read together and dealt out among them, so that crops of one read reach several batches; 1
    keeps them in one."""
    workers: int = speed(0, ge=0)
    """Loader processes; 0 loads in the main process. The samples are the same for any number."""
    cache_mb: int = speed(2048, ge=0)
    """Decoded images kept in memory per loader process, in MiB; one larger than an eighth of it is read by window."""
    cache: Literal["auto", "always", "off"] = speed("auto")
    """Keep decoded images on disk: auto those that decode slowly, always all, off none."""
    cache_dir: str | None = speed(None)
    """Folder of that cache, which several runs may share; None is `cache` in the run."""
    cache_gb: float = speed(20.0, gt=0)
    """Most that the cache takes, in GiB; what no longer fits is decoded each time."""

    @model_validator(mode="after")
    def _weights_are_positive(self) -> DataConfig:
        if self.weights is not None and not all(weight > 0 for weight in self.weights.values()):
            raise ValueError(f"weights are positive, not {self.weights}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_name_is_a_list(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("modality"), str):
            return {**data, "modality": (data["modality"],)}
        return data


class ModelConfig(Section):
    """The masked autoencoder."""

    size: Literal["tiny", "small", "base", "large"] = science("tiny")
    """timm's ViT sizes: width 192, 384, 768, 1024 and depth 12 (24 for large)."""
    depth: int | None = science(None, ge=1)
    """Number of encoder blocks, where it differs from the size's."""
    patch_2d: Pair | None = science(None)
    """Patch of rasters and planes in pixels (rows, columns)."""
    patch_3d: Triple | None = science(None)
    """Patch of volumes in voxels (slices, rows, columns)."""
    reference_gsd_m: float | None = science(None, gt=0)
    """Ground sampling distance at which neighbouring patches are one position unit apart, about the finest of the
    archive (patches closer than a fifth of a unit have nearly the same code); None takes each image's own grid as the
    reference, so that positions count patches."""
    reference_spacing_mm: tuple[Spacing, Spacing, Spacing] | None = science(None)
    """The same for volumes, per axis (slice, row, column) in mm; planes use the last two."""
    basis: int = science(32, ge=3)
    """Number of shared filters of which every channel's patch embedding is a combination."""
    decoder_dim: int = science(128, ge=16)
    """Width of the decoder."""
    decoder_depth: int = science(4, ge=1)
    """Number of decoder blocks."""
    mode: Literal["exact", "fast"] = science("fast")
    """fast: a decoder of cross-attention that is asked for a part of the hidden patches (CrossMAE, arXiv 2401.14391).
    exact: the published objective, a decoder of self-attention over all patches. Frozen features of short runs were
    better with fast and a predict_ratio of 0.5, at 0.9 of the time (benchmarks/ablations.py)."""
    predict_ratio: float | None = science(None, gt=0.0, lt=1.0)
    """Of mode fast: share of an image's valid patches that the decoder is asked for, at most the hidden ones; None is
    0.5, or all that are hidden where these are fewer."""
    mask_ratio: float | tuple[float, float] = science(0.75)
    """Share of an image's valid patches hidden from the encoder: a number, or a range [low, high] of which each step
    draws one of five values."""
    mask_block: int = science(1, ge=1)
    """Edge in patches of the blocks that are hidden or shown as a whole; 1 hides single patches."""
    target: Literal["patch_channel", "patch", "none"] = science("patch_channel")
    """Normalisation of targets: per patch and channel, per patch jointly (as published), or none."""
    stats_weight: float = science(1.0, ge=0.0)
    """Weight of the loss on each patch's mean and log standard deviation."""
    channel_drop: float = science(0.0, ge=0.0, lt=1.0)
    """Probability of hiding a channel from the encoder while still asking for it; one channel is always shown."""
    init: str | None = science(None)
    """Encoder folder, run, Hugging Face ViTMAE folder or timm ViT folder to start from; None is random weights."""

    @model_validator(mode="after")
    def _has_a_patch(self) -> ModelConfig:
        if self.patch_2d is None and self.patch_3d is None:
            raise ValueError("set model.patch_2d, model.patch_3d or both")
        return self

    @model_validator(mode="after")
    def _hidden_and_asked_shares_fit(self) -> ModelConfig:
        low, high = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio is a number in (0, 1) or a range [low, high] of such, not {self.mask_ratio}")
        if self.predict_ratio is not None and self.mode == "exact":
            raise ValueError("predict_ratio belongs to mode fast; exact asks for every hidden patch")
        if self.mode == "fast" and (self.predict_ratio or 0) > low:
            raise ValueError(f"predict_ratio {self.predict_ratio} is more than is hidden (mask_ratio {low})")
        return self


class TrainConfig(Section):
    """The loop and its optimiser."""

    steps: int = run(1000, ge=1)
    """Optimiser steps of the whole run. The learning rate falls to 0 over them: a run that is resumed with more steps
    than it began with goes on from its checkpoint along the longer schedule."""
    batch_size: int = science(32, ge=1)
    """Samples per step."""
    accumulate: int = run(1, ge=1)
    """Parts in which a step's samples pass through the model, for less memory; a divisor of batch_size."""
    optimizer: Literal["muon", "adamw"] = science("muon")
    """muon: torch.optim.Muon for the blocks' matrices and AdamW for the rest; adamw: AdamW for everything."""
    lr: float = science(1e-3, gt=0)
    """Peak learning rate of AdamW; Muon's is train.muon_lr."""
    muon_lr: float = science(0.02, gt=0)
    """Peak learning rate of Muon's matrices."""
    weight_decay: float = science(0.05, ge=0)
    """Decoupled weight decay of matrices; biases, norms and codes have none."""
    warmup: float = science(0.05, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises linearly."""
    clip: float = science(1.0, gt=0)
    """Largest gradient norm."""
    layer_decay: float = science(1.0, gt=0, le=1.0)
    """Factor of the learning rate from one block to the one below (fine-tuning)."""
    seed: int = science(0, ge=0)
    """Seed of initial weights, order, crops, augmentation and masks."""
    seeds: int = run(1, ge=1)
    """finetune: number of runs, with the seeds seed, seed + 1, ... (--seeds)."""
    validate_every: int | None = run(None, ge=1)
    """finetune: steps between scores over the validation part (labels.validation); the best weights are kept."""
    patience: int | None = run(None, ge=1)
    """finetune: validations without a better score after which training stops; None goes on to the last step."""
    checkpoint_every: int = run(500, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep: int = run(2, ge=1)
    """Checkpoints kept; older ones are deleted."""
    keep_every: int | None = run(None, ge=1)
    """Checkpoints of steps that are multiples of this are never deleted; a multiple of checkpoint_every."""
    log_every: int = run(10, ge=1)
    """Steps between lines of metrics.jsonl."""
    precision: Literal["auto", "fp32", "bf16"] = science("auto")
    """auto: bf16 autocast on CUDA devices that have it, fp32 elsewhere."""
    device: str = run("auto")
    """auto: cuda when there is one, else cpu."""
    compile: bool = run(False)
    """Run the model through torch.compile; losses differ by rounding."""
    ema: float | None = science(None, gt=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights, which then becomes the encoder; None keeps none."""
    sharding: Literal["replicated", "fsdp"] = run("replicated")
    """With several processes (torchrun): every one holds the model, or each a part of it (FSDP2)."""
    timeout_s: int = run(1800, ge=10)
    """Seconds after which processes give up waiting for one another; what the first one does alone (saving, drawing,
    probing) must fit in."""
    panels_every: int | None = run(None, ge=1)
    """Steps between live pictures of reconstructions; None draws them at the end alone."""
    probe_every: int | None = run(None, ge=1)
    """With --labels: steps between probes of the features; None probes at the end alone."""
    mlflow: str | None = run(None)
    """Name of an MLflow experiment that metrics are sent to as well (pip install mlflow); None sends nothing."""

    @model_validator(mode="after")
    def _counts_fit(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} is no divisor of batch_size {self.batch_size}")
        if self.patience is not None and self.validate_every is None:
            raise ValueError("train.patience counts validations; set train.validate_every too")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}, so that its "
                "checkpoints would never be written"
            )
        return self


CODE_CATEGORIES = (
    "tissue",
    "anatomical structure",
    "morphologically abnormal structure",
    "body substance",
    "physical object",
    "substance",
    "function",
    "spatial and relational concept",
)
"""Kinds of things that a segment can be (DICOM PS3.16, CID 7150)."""
CODE_LENGTHS = {"scheme": 16, "value": 16, "meaning": 64}
"""What a code consists of, and how long each part may be (DICOM PS3.5, value representations SH and LO)."""


def check_codes(codes: Mapping[str, Mapping[str, str]], classes: Sequence[str]) -> None:
    """Make sure that the codes of classes can stand in a DICOM object.

    Raises:
        ValueError: a code of no class, without one of its parts, or with a text that DICOM cannot hold.
    """
    for name, code in codes.items():
        if name not in classes:
            raise ValueError(f"codes: '{name}' is none of the classes {', '.join(classes)}")
        for part, longest in CODE_LENGTHS.items():
            text = code.get(part, "")
            if not 0 < len(text.strip()) <= longest or "\\" in text or not text.isprintable():
                raise ValueError(
                    f"codes.{name}: {part} is 1 to {longest} printed characters without a backslash, not {text!r}"
                )
        if code.get("category", "tissue") not in CODE_CATEGORIES:
            raise ValueError(f"codes.{name}: category '{code['category']}' is none of {', '.join(CODE_CATEGORIES)}")


class HeadConfig(Section):
    """The downstream task: what is asked, by which head, with which loss."""

    task: Literal["segment", "classify"] = science("segment")
    """segment: a class a pixel or voxel. classify: a class (or, by the labels, several) an image."""
    name: str | None = science(None)
    """Head, a module in geomed_mae/heads or an entry point: linear, attentive (classify), convolutional, unetr
    (segment). None is convolutional or attentive, by the task."""
    classes: tuple[str, ...] = science(("background", "foreground"))
    """Class names in the order of their numbers."""
    frozen: bool = science(False)
    """Train the head alone."""
    frozen_share: float = science(0.0, ge=0.0, lt=1.0)
    """Share of the steps, from the first, in which the head alone is trained, so that gradients of an untrained head do
    not wipe out pretrained features (Kumar et al., arXiv 2202.10054)."""
    read_out: Literal["last", "several"] = science("several")
    """Tokens that the head is given: of the last block, or of three blocks, one at each third of the depth."""
    width: int = science(64, ge=8)
    """Width of a convolutional head."""
    loss: Literal["auto", "dice_ce", "cross_entropy", "focal"] = science("auto")
    """auto: Dice and cross entropy for segment, cross entropy for classify (binary per class where labels are
    multi-label). focal: Lin et al., arXiv 1708.02002."""
    focal_gamma: float = science(2.0, ge=0.0)
    """Exponent of the focal loss."""
    class_weights: tuple[float, ...] | Literal["balanced"] | None = science(None)
    """Weight of each class in the entropy or focal loss; balanced goes by the inverse of how often classes occur among
    the training labels."""
    label_smoothing: float = science(0.0, ge=0.0, lt=1.0)
    """Share of the target that cross entropy spreads over all classes."""
    codes: dict[str, dict[Literal["scheme", "value", "meaning", "category"], str]] | None = run(None)
    """Class name -> what DICOM SEG calls it, for example {scheme: SCT, value: "10200004", meaning: Liver}; category is
    tissue, anatomical structure, morphologically abnormal structure, body substance, physical object, substance ...
    (tissue where not given). Classes that are not listed are looked up by name among the standard's own terms."""

    @model_validator(mode="after")
    def _codes_are_codes_of_classes(self) -> HeadConfig:
        check_codes(self.codes or {}, self.classes)
        return self


def _is_whole(key: Any) -> bool:
    return isinstance(key, str) and key.removeprefix("-").isdecimal()


class LabelConfig(Section):
    """How labels are read and split."""

    values: dict[int | str, int] | None = science(None)
    """Stored label value, or name in files that name their classes (DICOM SEG, RTSTRUCT, vectors) -> class number. None
    takes values as class numbers, and names as those of head.classes. Values not listed are ignored, names left out."""
    ignore: tuple[int, ...] = science(())
    """Stored values that mean "not known", for example [255]; negative ones too."""
    resample: Literal["nearest"] | None = science(None)
    """nearest: put label volumes on another grid than their image's onto it; None refuses them."""
    column: str | None = science(None)
    """Attribute of vector label files that holds the class."""
    key_column: str | None = science(None)
    """Column of a CSV of classification labels that names the image (file, index key, identifier); None infers it."""
    class_columns: tuple[str, ...] = science(())
    """Columns of such a CSV that hold the class: one of names or numbers, or several of 0 and 1; () infers them."""
    test: float = science(0.25, ge=0.0, lt=1.0)
    """Share of groups (patients, scenes) held out for the score. An INDEX with a stored split (scan --split) is split
    as stored instead: its parts train, validation and test."""
    validation: float = science(0.0, ge=0.0, lt=1.0)
    """Share of the remaining groups that early stopping looks at (train.validate_every); they are not trained on."""
    split_seed: int = science(0, ge=0)
    """Seed of the split, which therefore stays the same over train.seeds."""
    fraction: float | None = science(None, gt=0.0, le=1.0)
    """Share of the training groups whose labels are used (--label-fraction), drawn by train.seed."""
    shots: int | None = science(None, ge=1)
    """Number of labelled training groups used (segment), or of images of each class (classify) (--shots), drawn by
    train.seed; the validation share comes out of them."""
    buffer_m: float = science(0.0, ge=0.0)
    """Rasters of different parts must be further apart than this on the ground; overlap is always refused."""
    block_px: int | None = science(None, ge=16)
    """With a single labelled scene: split it into square blocks of this many pixels instead of by scene."""

    @model_validator(mode="after")
    def _few_labels_in_one_way(self) -> LabelConfig:
        if self.fraction is not None and self.shots is not None:
            raise ValueError("labels.fraction and labels.shots both say how many labels to use; set one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _digits_are_numbers(cls, data: Any) -> Any:
        # A resolved recipe is read back from JSON-like YAML, where every key is text.
        if isinstance(data, dict) and isinstance(data.get("values"), dict):
            keys = {key: int(key) if _is_whole(key) else key for key in data["values"]}
            return {**data, "values": {keys[key]: number for key, number in data["values"].items()}}
        return data


class Recipe(Section):
    """A pretraining recipe, or with `head` a fine-tuning recipe."""

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig | None = None
    train: TrainConfig = Field(default_factory=TrainConfig)
    head: HeadConfig | None = None
    labels: LabelConfig = Field(default_factory=LabelConfig)

    @property
    def verb(self) -> str:
        """Return "finetune" when there is a head, else "pretrain"."""
        return "pretrain" if self.head is None else "finetune"

    @model_validator(mode="after")
    def _crops_fit_patches(self) -> Recipe:
        if self.model is None:
            return self
        for name, crop, patch in (
            ("2d", self.data.crop_2d, self.model.patch_2d),
            ("3d", self.data.crop_3d, self.model.patch_3d),
        ):
            if crop and not patch:
                raise ValueError(f"data.crop_{name} is set but model.patch_{name} is not")
            if patch and not crop:
                raise ValueError(f"model.patch_{name} is set but data.crop_{name} is not")
            if crop and any(c % p for c, p in zip(crop, patch, strict=True)):
                raise ValueError(f"data.crop_{name} {list(crop)} is not a multiple of model.patch_{name} {list(patch)}")
        return self
