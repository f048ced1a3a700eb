"""Triton kernels of mnv4_ops, one operation per file; installed as ``mnv4_ops.triton_kernels``.

The kernels land with the GPU work. `tuned/index.json` lists the tables of tuned configurations, one per GPU.
"""

# another published package has the top-level name
if __name__ != "mnv4_ops.triton_kernels":
    raise ImportError(f"import this package as mnv4_ops.triton_kernels, not as {__name__}", name=__name__)
