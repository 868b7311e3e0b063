"""Servers, clients and result rows: how vllm-double is measured, demonstrated and compared."""
