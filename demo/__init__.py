"""Trying Sa2VA: ask about a file (`predict.py`), the sample files (`make_samples.py`), the picture of the README."""
