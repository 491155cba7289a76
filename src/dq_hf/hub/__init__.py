"""Saved folders, model cards, exported code and the Hub; imports nothing of dq_hf but itself."""
