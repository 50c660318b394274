"""Triton kernels of the ops. `functions` is the backend; nothing here is imported unless triton is installed and a call asks for it."""
