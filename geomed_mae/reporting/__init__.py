"""Reporting: from the records of a run to one self-contained page. Nothing here computes; training has written it down.

records    what a run folder says about itself, finished or not
curves     losses, learning rate, speed and probe over the steps
series     live panels side by side, so that one sees features emerge
tables     archive, ledger, throughput and environment as tables
markdown   the model card as HTML
section    one run as a section
scores     scores of a fine-tuning run, its labels and leakage record as tables
study      a study of several runs as a section
arms       its pictures: both arms, differences of patients, learning curves
page       the page
pages      which page a folder gets
"""
