"""The programs that train: tokenizer, code cache, generator; each is one file with its loop to read."""
