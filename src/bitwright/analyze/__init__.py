"""Analysis: what a model's activations look like, what calibration text changes, and the recipe that follows.

statistics.py, outliers.py, summary.py   one streaming pass over the activations
corpora.py, sets.py                      calibration sets
model.py, advice.py, thresholds.py       the report as data, and what follows from it
svg.py, figures.py, report.py            the report as files
run.py                                   all of it
"""
