"""Drafters in the formats of vLLM, SGLang, llama.cpp, transformers and speculators."""
