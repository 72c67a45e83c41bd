import os

import hypothesis
import pytest
import torch
from real_models import gemma3_folder, smollm2_folder  # noqa: F401  fixtures

# The same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
# Engines run inside the test process, so that tests can look at the scheduler's blocks and the layers' state.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its own functions are wrapped then
# Tensors in these tests are small: a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder in which tiny checkpoints are made once per session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def needle_folder(models):
    """The needle model's checkpoint."""
    from needle_model import build

    return build(models / "needle")
