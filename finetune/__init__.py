"""Training (`train.py`): on one's own data (`recipe.py`), or a small Sa2VA from nothing (`scenes.py`)."""
