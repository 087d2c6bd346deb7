"""What was measured about the embedded weights: one file a study, each writing its results to figures/data.

Run one with `python -m minicpm_ref.studies.<name> CORPUS`; finished parts are kept when it is interrupted, and the
figures are drawn from the file it leaves (`make figures`). Speed is measured elsewhere, in kernels/bench.
"""
