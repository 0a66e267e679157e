"""How a model spends its attention over time, and the PackCache options that follow from it."""
