"""From nothing to an answer on a real picture: a small Qwen-VL taught to read handwritten digits in its three stages."""
