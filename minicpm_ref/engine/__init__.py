"""CPM.cu in small: one engine above executors that know how to run a model and nothing else."""

from minicpm_ref.engine.conversation import chat_prompt
from minicpm_ref.engine.engine import ContextLengthError, Engine, Result, Stream
from minicpm_ref.engine.executor import Executor
from minicpm_ref.engine.request import Statistics
from minicpm_ref.engine.torch_executor import TorchExecutor

__all__ = [
    "ContextLengthError",
    "Engine",
    "Executor",
    "Result",
    "Statistics",
    "Stream",
    "TorchExecutor",
    "chat_prompt",
]
