"""Measurements that anyone can repeat; each script says at its top what it measures, docs/performance.md what came."""
