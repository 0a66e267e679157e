"""A bundled demo model: a tiny autoregressive video model, the world it was trained on, and its tokenizer."""
