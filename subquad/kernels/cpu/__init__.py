"""The C++ backend: source as text in *_source.py (so that student folders carry it), compiled on first use, called through ctypes."""
