"""Measurements that anyone can repeat: what a checkpoint of true size costs (`real_size.py`)."""
