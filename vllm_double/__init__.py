"""vllm-double: parallel drafting with double retrieval for vLLM, with exactly the target's output."""

__all__ = ["__version__"]

__version__ = "0.1.0"
