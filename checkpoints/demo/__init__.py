"""The bundled demo model: its text generators, tokenizer, training and evaluation."""
