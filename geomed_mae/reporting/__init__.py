"""Reporting: from the records of a run to one self-contained page. Nothing here computes; training has written it down.

records    what a run folder says about itself, finished or not
curves     losses, learning rate, speed and probe over the steps
series     live panels side by side, so that one sees features emerge
tables     archive, ledger, throughput and environment as tables
markdown   the model card as HTML
section    one run as a section
page       the page
"""
