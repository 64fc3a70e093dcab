"""What every test shares: one thread, as in the published numbers."""

import torch

torch.set_num_threads(1)
