"""Training: stages, recipes, LoRA, evaluation, the command line. Kept empty, so that `qwenvl --help` is quick."""
