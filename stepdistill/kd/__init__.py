"""Floor 2: classic distillation, of classifiers and language models; one file per paper."""
