"""Types of numbers by torch's names, for what must not import torch: it takes seconds."""

from __future__ import annotations

SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ITEMSIZE = {  # bytes
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
