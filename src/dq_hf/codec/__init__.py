"""What an image costs in codes and bits."""
