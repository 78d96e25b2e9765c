"""Analysis of trained checkpoints: records out of runs, and rules that judge them."""
