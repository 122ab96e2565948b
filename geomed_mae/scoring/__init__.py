"""Scores of predictions, and how sure they are: what `finetune`, `evaluate` and `probe` report.

    segmentation.py    class maps: Dice, IoU, surface distance, calibration, per class and image
    classification.py  classes of images: accuracy, balanced accuracy, AUROC, average precision, calibration
    intervals.py       bootstrap intervals over patients or scenes, and the difference of paired runs
    pictures.py        confusion, calibration and worst cases as PNG
"""
