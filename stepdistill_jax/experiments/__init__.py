"""Several runs side by side: the demo and its plots."""
