"""From nothing to an answer on a real picture: a small Qwen-VL learns to read handwriting in its three stages."""
