"""VideoLLaMA2, 2.1 and 2.1-AV (arXiv:2406.07476), which transformers does not have.

model = load("VideoLLaMA2.1-7B-16F")
processor = Processor.from_pretrained("VideoLLaMA2.1-7B-16F")
inputs = processor.ask("What happens?", video="clip.mp4")
with PureKV(PureKVConfig(budget=0.2))(model):
    output = model.generate(**inputs, max_new_tokens=64)
"""

from purekv.families.videollama2.config import CONFIGS, read_config
from purekv.families.videollama2.family import VideoLLaMA2
from purekv.families.videollama2.load import load
from purekv.families.videollama2.processor import Processor

__all__ = ["CONFIGS", "Processor", "VideoLLaMA2", "load", "read_config"]
