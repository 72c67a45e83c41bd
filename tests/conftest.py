import torch

# Tensors in these tests are small: a second thread costs more than it saves.
torch.set_num_threads(1)
