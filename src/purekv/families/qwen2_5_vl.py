"""Qwen2.5-VL."""

from purekv.families.grids import GridFamily


class Qwen25VL(GridFamily):
    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    checkpoints = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
    tested_on = (*GridFamily.tested_on, "the embedded reference model")
