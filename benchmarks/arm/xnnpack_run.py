"""Runs .tflite files one after the other in XNNPACK on one thread, each forward between markers; on aarch64.

    python benchmarks/arm/xnnpack_run.py LIBMARK FILE...

LIBMARK exports begin() and end(), which are `hint #64` and `hint #65`.
"""

import ctypes
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter

mark = ctypes.PyDLL(sys.argv[1])
begin, end = mark.begin, mark.end
for path in sys.argv[2:]:
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()[0]
    x = np.random.default_rng(0).normal(size=details["shape"]).astype(np.float32)
    interpreter.set_tensor(details["index"], x)
    invoke = interpreter._interpreter.Invoke  # without what Python does around it
    invoke()
    begin()
    invoke()
    end()
