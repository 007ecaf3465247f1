"""Checkpoints for other runtimes: GGUF for llama.cpp, ONNX."""
