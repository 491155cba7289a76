"""What the example scripts share; needs the extra `train`."""
