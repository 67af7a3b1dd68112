"""Training: a small Sa2VA from nothing on synthetic scenes (`train.py`, `tiny.py`, `batches.py`)."""
