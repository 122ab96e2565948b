"""Scores of predictions, and how sure they are: what `finetune`, `evaluate` and `probe` report.

    segmentation.py     class maps: Dice, IoU, surface distance, calibration, per class, image and group
        image_score.py  what one image leaves behind, in constant memory
        surfaces.py     surface distances, by MONAI
    classification.py   classes of images: AUROC, average precision, accuracies, Brier score, calibration
        ranking.py      AUROC and average precision, fast enough for bootstraps
        decisions.py    the scores that need no ranking
    shares.py           shares of classes in patches, for probes
    confusion.py  calibration.py  values.py
    intervals.py        bootstrap intervals over patients or scenes, and the difference of paired runs
    stored.py           scores.json: all of it, to compare runs later
    predicting.py       from a task model and labelled images to scores
    pictures.py         confusion, calibration and worst cases as PNG (charts, worst, worst_pictures, figure)

What is not defined is None everywhere: neither 0 nor 1, and no part of a mean.
"""
