"""CPM.cu in small: one engine above executors that know how to run a model and nothing else."""

from minicpm_ref.engine.executor import Executor
from minicpm_ref.engine.torch_executor import TorchExecutor

__all__ = ["Executor", "TorchExecutor"]
