"""What the experiments of configs/ are estimated to cost."""
