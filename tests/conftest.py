"""Settings of the whole suite: one thread, and property tests without a deadline."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("loko", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("loko")
