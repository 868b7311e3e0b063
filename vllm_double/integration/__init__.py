"""The thin adapters between vLLM and the plug-in. Nothing here is imported before method "double" is chosen."""
