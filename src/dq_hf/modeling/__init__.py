"""The models and what they are made of; this flat folder is what travels to the Hub as remote code."""
