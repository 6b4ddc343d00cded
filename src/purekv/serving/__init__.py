"""Compression inside vLLM: a plugin that frees the blocks of evicted entries (docs/serving.md).

vLLM finds `purekv.serving.plugin:register` by the entry point group `vllm.general_plugins`. Modules
that import vLLM say so in their first line; the others need torch at most.
"""
