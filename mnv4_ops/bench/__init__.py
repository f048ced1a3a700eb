"""Honest timing: correctness gate first, every variant interleaved in one pinned process, medians with quantiles.

timing.py    the interleaved clock          machine.py  cores, pinning, environment
inputs.py    models, weights, photographs   gate.py     "is it the same answer?"
run.py       the whole of `mnv4-ops bench`  cell.py     one (model, batch, threads)
blocks.py    one row per block     ops/, rows.py, op_run.py  single ops (`--ops`), one file each
isolate.py   a fresh process per cell
report.py    tables, Markdown, JSON
gpu*.py      on a GPU: gpu_run.py the plan, gpu.py one (model, dtype, batch), gpu_clock.py events, gpu_report.py
layers.py    what a block is made of  roofline*.py  the paper's roofline; plots.py the figures
ceilings.py  FMA peaks, bandwidths   published.py  accuracies of others (data/)
page*.py     the report             compare.py  two result files       pareto.py  accuracy against latency
peers/       what it is compared with, one file each
"""
