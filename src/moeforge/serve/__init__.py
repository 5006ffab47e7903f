"""Generation in vLLM's names: `LLM`, `SamplingParams`, `RequestOutput`."""

from moeforge.serve.llm import LLM
from moeforge.serve.outputs import CompletionOutput, RequestOutput
from moeforge.serve.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
