"""Qwen2-VL."""

from purekv.families.grids import GridFamily


class Qwen2VL(GridFamily):
    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    checkpoints = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct")
