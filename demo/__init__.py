"""Trying Sa2VA: one file (`predict.py`), a folder (`predict_folder.py`), a page (`app.py`), `sa2va` (`cli/`)."""
