"""A GGUF file, llama.cpp's format, becomes a model folder: folder.py knows both formats."""
